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

from tf_dropmax import DropMaxHead, DropMaxLoss, DropMaxPredict, set_predict_mode

WORKERS = Path(__file__).parents[1] / "workers.py"


def build(**kwargs):
    model = keras.Sequential([keras.Input((6,)), DropMaxHead(4, seed=1, **kwargs)])
    model.compile(keras.optimizers.SGD(0.3), DropMaxLoss(), metrics=["accuracy"])
    return model


@pytest.mark.parametrize("training", [True, False])
def test_replicas_draw_different_masks(strategy, training):
    with strategy.scope():
        head = DropMaxHead(200, seed=1)
        head.build((None, 3))
    set_predict_mode(head, "sampled", 1)

    @tf.function
    def outputs():
        return strategy.run(lambda: head(tf.zeros((50, 3)), training=training))

    # In a row, the output of a class depends on nothing but its mask.
    draws = [x for _ in range(2) for x in strategy.experimental_local_results(outputs())]
    rows = [(x - tf.reduce_mean(x, -1, keepdims=True)).numpy().ravel() for x in draws]
    assert abs(np.corrcoef(rows) - np.eye(4)).max() < 0.05  # 5 sigma


def test_the_gradient_is_that_of_one_device_on_the_joined_batch(strategy, blobs):
    """Without masks, which differ between replicas. The entropy term is scaled like the loss."""
    x, y = blobs
    with strategy.scope():
        model = build(stochastic=False, entropy_weight=2.0)
    single = build(stochastic=False, entropy_weight=2.0)
    fit = {"batch_size": 40, "epochs": 3, "shuffle": False, "verbose": 0}
    histories = [m.fit(x, y, **fit).history for m in (model, single)]
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

    def predictions(model, mode, samples=30):
        return model.predict(x, callbacks=[DropMaxPredict(mode, samples=samples)], verbose=0)

    for mode in ["expected", "exact", "softmax"]:
        one, other = (predictions(m, mode) for m in (model, single))
        np.testing.assert_allclose(one, other, atol=1e-5)
        callbacks = [DropMaxPredict(mode)]
        one, other = (m.evaluate(x, y, callbacks=callbacks, verbose=0) for m in (model, single))
        np.testing.assert_allclose(one, other, rtol=1e-4)
    p = np.exp(predictions(model, "sampled", 200))
    np.testing.assert_allclose(p, np.exp(predictions(single, "exact")), atol=0.25)
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
        command = [sys.executable, str(WORKERS), program, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **output))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def succeed(*processes):
    for process in processes:
        said = process.communicate(timeout=180)[1]
        assert process.returncode == 0, said


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
