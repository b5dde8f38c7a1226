"""`MirroredStrategy` over two logical CPUs (see conftest.py), and several processes.

The processes run programs of workers.py and talk over loopback.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_dropmax
from tf_dropmax import DropMaxHead, DropMaxLoss, DropMaxPredict, functional, set_predict_mode
from tf_dropmax.seeds import next_seed

WORKERS = Path(__file__).parents[1] / "workers.py"


@pytest.fixture(scope="module")
def strategy():
    # One for all tests: the collective operations of two strategies would mix.
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def build(**kwargs):
    model = keras.Sequential([keras.Input((6,)), DropMaxHead(4, seed=1, **kwargs)])
    model.compile(keras.optimizers.SGD(0.3), DropMaxLoss(), metrics=["accuracy"])
    return model


def test_replicas_draw_different_masks(strategy):
    with strategy.scope():
        head = DropMaxHead(50, seed=1)
        head.build((None, 3))
    features = tf.ones((4, 3))

    @tf.function
    def outputs(training):
        return strategy.run(lambda: head(features, training=training))

    def uniform():
        return functional.uniform_draws((10_000,), next_seed(head._train_seeds))

    @tf.function
    def draws():
        return strategy.run(uniform)

    set_predict_mode(head, "sampled")
    for call in [lambda: outputs(True), lambda: outputs(False), draws]:
        one, other = (value.numpy() for value in strategy.experimental_local_results(call()))
        again, _ = (value.numpy() for value in strategy.experimental_local_results(call()))
        assert np.abs(one - other).max() > 1e-3
        assert np.abs(one - again).max() > 1e-3
    assert abs(np.corrcoef([one, other, again]) - np.eye(3)).max() < 0.05  # 5 sigma


def test_the_gradient_is_that_of_one_device_on_the_joined_batch(strategy, blobs):
    """Without masks, which differ between replicas. The entropy term is scaled like the loss."""
    x, y = blobs
    with strategy.scope():
        model = build(stochastic=False, entropy_weight=2.0)
    single = build(stochastic=False, entropy_weight=2.0)
    histories = [
        m.fit(x, y, batch_size=40, epochs=3, shuffle=False, verbose=0).history
        for m in (model, single)
    ]
    np.testing.assert_allclose(histories[0]["loss"], histories[1]["loss"], rtol=1e-5)
    for one, other in zip(model.get_weights(), single.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_replica_without_examples(strategy, blobs):
    """The last of 33 rows is a batch of its own, of which one replica gets nothing."""
    x, y = blobs
    with strategy.scope():
        model = build(stochastic=False)
    loss = model.fit(x[:33], y[:33], batch_size=32, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(loss).all()
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.parametrize("settings", [{"posterior": "label"}, {"retain_probability": 0.6}], ids=str)
def test_other_heads_train(strategy, blobs, settings):
    x, y = blobs
    with strategy.scope():
        model = build(**settings)
    model.fit(x, y, batch_size=32, epochs=10, shuffle=False, verbose=0)
    assert model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"] > 0.9


def test_fit_evaluate_predict_in_all_modes(strategy, blobs):
    x, y = blobs
    with strategy.scope():
        model = build()
    callbacks = [DropMaxPredict("sampled")]
    settings = {"batch_size": 32, "epochs": 10, "shuffle": False, "verbose": 0}
    model.fit(x, y, validation_data=(x, y), callbacks=callbacks, **settings)
    single = build()
    single.set_weights(model.get_weights())
    for mode in ["expected", "exact", "softmax"]:
        callbacks = [DropMaxPredict(mode)]
        one, other = (m.predict(x, callbacks=callbacks, verbose=0) for m in (model, single))
        np.testing.assert_allclose(one, other, atol=1e-5)
        one, other = (m.evaluate(x, y, callbacks=callbacks, verbose=0) for m in (model, single))
        np.testing.assert_allclose(one, other, rtol=1e-4)
    p, exact = (
        np.exp(each.predict(x, callbacks=[callback], verbose=0))
        for each, callback in [
            (model, DropMaxPredict("sampled", samples=200)),
            (single, DropMaxPredict("exact")),
        ]
    )
    np.testing.assert_allclose(p, exact, atol=0.25)
    assert np.mean(p.argmax(-1) != y) < 0.1


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def start():
    """Starts a program of workers.py, which ends with the test."""
    processes = []

    def start(program, folder, **environment):
        command = [
            sys.executable,
            str(WORKERS),
            program,
            str(folder),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **output))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def start_workers(start, folder):
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    configs = [
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        for index in (0, 1)
    ]
    return [start("multi_worker", folder, TF_CONFIG=json.dumps(config)) for config in configs]


def succeed(*processes):
    for process in processes:
        said = process.communicate(timeout=180)[1]
        assert process.returncode == 0, said


def results(folder):
    return [json.loads((folder / f"result-{index}.json").read_text()) for index in (0, 1)]


@pytest.mark.long
def test_two_workers_equal_one_process_and_resume_after_a_loss(tmp_path, start):
    for name in ("single", "whole", "lost"):
        (tmp_path / name).mkdir()
    succeed(start("multi_worker", tmp_path / "single"), *start_workers(start, tmp_path / "whole"))
    single = json.loads((tmp_path / "single" / "result-0.json").read_text())
    one, other = results(tmp_path / "whole")
    assert one == other  # Weights and history are equal to the last digit.
    joined, whole = single["deterministic"], one["deterministic"]
    assert whole["rows"] == 64
    for key, values in joined["history"].items():
        np.testing.assert_allclose(whole["history"][key], values, rtol=1e-4)
    for weight, expected in zip(whole["weights"], joined["weights"], strict=True):
        np.testing.assert_allclose(weight, expected, atol=1e-5)
    history = one["stochastic"]["history"]
    assert history["loss"] != single["stochastic"]["history"]["loss"]  # The masks differ.
    assert history["val_accuracy"][-1] > 0.8

    (tmp_path / "lost" / "kill-1").touch()
    survivor, lost = start_workers(start, tmp_path / "lost")
    assert lost.wait(timeout=180) == -9
    survivor.communicate(timeout=180)
    assert survivor.returncode != 0, "a single worker must not continue"
    succeed(*start_workers(start, tmp_path / "lost"))
    again, _ = results(tmp_path / "lost")
    assert again["deterministic"]["steps"] == 24
    for weight, expected in zip(again["deterministic"]["weights"], whole["weights"], strict=True):
        np.testing.assert_allclose(weight, expected, atol=1e-6)


def test_multi_worker_changes_nothing_under_another_strategy(strategy):
    with strategy.scope():
        model = build()
    before = dict(vars(model))
    with tf_dropmax.multi_worker(model) as same:
        assert same is model
    assert vars(model) == before
    with pytest.raises(ValueError, match="Expected a Keras model"):
        tf_dropmax.multi_worker("model").__enter__()


@pytest.mark.long
def test_keras_tuner_over_two_workers(tmp_path, start):
    (port,) = free_ports(1)
    oracle = {"KERASTUNER_ORACLE_IP": "127.0.0.1", "KERASTUNER_ORACLE_PORT": str(port)}
    start("tuner", tmp_path, KERASTUNER_TUNER_ID="chief", **oracle)
    names = ("one", "two")
    succeed(*(start("tuner", tmp_path, KERASTUNER_TUNER_ID=name, **oracle) for name in names))
    paths = (tmp_path / "search").glob("trial_*/trial.json")
    trials = [json.loads(path.read_text()) for path in paths]
    assert len(trials) == 6
    assert all(trial["status"] == "COMPLETED" for trial in trials)
    values = [trial["hyperparameters"]["values"]["entropy_weight"] for trial in trials]
    assert len(set(values)) == 6
    best = [json.loads((tmp_path / f"best-{name}.json").read_text()) for name in names]
    assert set(best) <= set(values)
