"""Search spaces, tuners, objectives, and searches that are resumed."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import pytest
from keras_tuner import HyperParameters

from tf_dropmax import tuning
from tf_dropmax.tuning import DropMaxHyperModel, dropmax_head

WORKERS = Path(__file__).parents[1] / "workers.py"


def features(hp):
    initializer = keras.initializers.GlorotUniform(seed=0)
    hidden = keras.layers.Dense(8, "relu", kernel_initializer=initializer)
    return keras.Sequential([keras.Input((6,)), hidden])


class Quick(DropMaxHyperModel):
    """Its models run eagerly, because tracing takes longer than everything else."""

    def build(self, hp):
        model = super().build(hp)
        model.run_eagerly = True
        return model


def still(hp):
    return keras.optimizers.SGD(0.0)


def adam(hp):
    return keras.optimizers.Adam(0.01)


def test_the_space():
    space = HyperParameters()
    dropmax_head(space, 3)
    (entropy_weight,) = space.space
    draws = np.log10([entropy_weight.random_sample(seed) for seed in range(2000)])
    quantiles = np.quantile(draws, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(quantiles, [-2, -1.25, -0.5, 0.25, 1], atol=0.15)
    assert -2 <= draws.min() < draws.max() <= 1
    dropmax_head(space, 3, tune=tuning.TUNABLE)
    assert space.values == {
        "entropy_weight": 1.0,
        "temperature": 0.1,
        "posterior": "prior",
        "retain_l2": 0.0,
    }


@pytest.mark.parametrize(
    ("units", "entropy_weight", "auxiliary_weight"),
    [(3, (0.01, 1, 10), (0.01, 0.1, 1)), (3000, (1e-4, 1e-2, 0.1), (1e-4, 1e-3, 1e-2))],
)
def test_the_ranges_depend_on_the_number_of_classes(units, entropy_weight, auxiliary_weight):
    space = HyperParameters()
    dropmax_head(space, units, tune=["entropy_weight", "posterior"])
    for entry, expected in ((space.space[0], entropy_weight), (space.space[2], auxiliary_weight)):
        found = [entry.min_value, entry.default, entry.max_value]
        np.testing.assert_allclose(found, expected)


def test_the_head_has_the_values_of_the_space():
    values = {"entropy_weight": 3.0, "temperature": 0.5, "auxiliary_weight": 0.03}
    space = HyperParameters()
    space.values = {**values, "posterior": "label", "retain_l2": 1e-3}
    head = dropmax_head(space, 3, tune=tuning.TUNABLE, name="mine")
    assert (head.units, head.name, head.posterior) == (3, "mine", "label")
    config = head.get_config()
    assert {name: config[name] for name in values} == pytest.approx(values)
    assert head.branches["retain"].kernel_regularizer.l2 == pytest.approx(1e-3)
    assert head.branches["classes"].kernel_regularizer is None

    space.values = {**space.values, "posterior": "prior", "retain_l2": 0.0}
    head = dropmax_head(space, 3, tune=tuning.TUNABLE)
    assert (head.posterior, head.branches["retain"].kernel_regularizer) == ("prior", None)
    with space.name_scope("second"):
        assert dropmax_head(space, 3).get_config()["entropy_weight"] == 1.0


@pytest.mark.parametrize("tune", ["temperature", ["units"]])
def test_what_cannot_be_tuned(tune):
    with pytest.raises(ValueError, match=f"must be names out of .*tune={re.escape(repr(tune))}"):
        dropmax_head(HyperParameters(), 3, tune=tune)


@pytest.mark.parametrize("given", ["entropy_weight", "auxiliary_weight"])
def test_a_tuned_setting_cannot_be_given(given):
    with pytest.raises(TypeError, match=f"multiple values for keyword argument '{given}'"):
        dropmax_head(HyperParameters(), 3, tune=["entropy_weight", "posterior"], **{given: 1.0})


def test_a_hypermodel_can_be_pickled(rng):
    arguments = {"tune": tuning.TUNABLE, "seed": 0, "kernel_regularizer": "l2"}
    one = DropMaxHyperModel(features, 3, optimizer=adam, **arguments)
    other = pickle.loads(pickle.dumps(one))
    x = rng.normal(size=(5, 6)).astype("float32")
    spaces = [HyperParameters() for _ in range(2)]
    models = [hm.build(hp) for hm, hp in zip((one, other), spaces, strict=True)]
    assert spaces[0].get_config() == spaces[1].get_config()
    np.testing.assert_array_equal(models[0](x), models[1](x))
    assert other.objective == one.objective


def test_a_hypermodel_does_not_start_tensorflow():
    """Threads and collective operations must be configured before that."""
    code = (
        "import tensorflow as tf; from tf_dropmax import tuning;"
        "tuning.DropMaxHyperModel(lambda hp: None, 3, tune=['posterior']);"
        "tf.config.threading.set_inter_op_parallelism_threads(2)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_wrong_arguments_of_the_head_raise_before_the_first_trial(tmp_path):
    hypermodel = DropMaxHyperModel(features, 3, temperature=-1.0)
    with pytest.raises(ValueError, match="`temperature` must be"):
        keras_tuner.RandomSearch(hypermodel, hypermodel.objective, directory=tmp_path)


def test_dense_labels(tmp_path, blobs):
    x, y = blobs
    found = []
    for name, labels in (("sparse", y), ("dense", np.eye(4, dtype="float32")[y])):
        hypermodel = Quick(features, 4, optimizer=still, seed=0)
        options = {"max_trials": 1, "seed": 0, "directory": tmp_path, "project_name": name}
        tuner = keras_tuner.RandomSearch(hypermodel, hypermodel.objective, **options)
        tuner.search(x, labels, validation_data=(x, labels), verbose=0)
        (trial,) = tuner.oracle.trials.values()
        assert trial.status == "COMPLETED"
        found.append([trial.metrics.get_best_value(name) for name in ("val_nll", "val_accuracy")])
    np.testing.assert_allclose(*found, rtol=1e-6)


TUNERS = {
    "BayesianOptimization": {"max_trials": 3, "num_initial_points": 2},
    "Hyperband": {"max_epochs": 2, "factor": 2},
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The optimal value found:sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", TUNERS)
def test_tuners_that_learn_from_their_trials(tmp_path, blobs, name):
    """The search is interrupted in its second trial, and resumed."""
    x, y = blobs
    train, test = slice(0, 64), slice(64, 160)
    tune = tuning.TUNABLE if name == "BayesianOptimization" else ["entropy_weight"]

    def search(interrupted):
        hypermodel = Quick(features, 4, optimizer=adam, tune=tune)
        options = {"seed": 1, "directory": tmp_path, **TUNERS[name]}
        tuner = getattr(keras_tuner, name)(hypermodel, hypermodel.objective, **options)

        def end(batch, logs):
            if interrupted and len(tuner.oracle.trials) == 2:
                raise KeyboardInterrupt

        callbacks = [keras.callbacks.LambdaCallback(on_train_batch_end=end)]
        data = {"validation_data": (x[test], y[test]), "callbacks": callbacks}
        tuner.search(x[train], y[train], verbose=0, **data)
        return tuner

    with pytest.raises(KeyboardInterrupt):
        search(interrupted=True)
    before = [
        json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/trial_*/trial.json"))
    ]
    assert [trial["status"] for trial in before] == ["COMPLETED", "RUNNING"]
    tuner = search(interrupted=False)
    first, second = (tuner.oracle.trials[trial["trial_id"]] for trial in before)
    assert first.get_state() == before[0]
    assert second.hyperparameters.values == before[1]["hyperparameters"]["values"]
    trials = list(tuner.oracle.trials.values())
    assert [trial.status for trial in trials] == ["COMPLETED"] * TUNERS[name].get("max_trials", 5)
    values = [trial.hyperparameters.values["entropy_weight"] for trial in trials]
    assert all(0.01 <= value <= 10 for value in values)
    repeated = 1 if name == "Hyperband" else 0  # It continues one of its trials.
    assert len(set(values)) == len(values) - repeated
    p = np.exp(tuner.get_best_models()[0](x[test]))
    score = -np.log(p[np.arange(96), y[test]]).mean()
    assert score == pytest.approx(min(trial.score for trial in trials), rel=1e-5)


def test_a_model_loads_the_optimizer_of_an_earlier_trial(tmp_path, blobs):
    """As in Hyperband."""
    x, y = blobs
    hypermodel = Quick(features, 4)
    model, later = (hypermodel.build(HyperParameters()) for _ in range(2))
    model.fit(x, y, verbose=0)
    model.save_weights(tmp_path / "checkpoint.weights.h5")
    later.load_weights(tmp_path / "checkpoint.weights.h5")
    assert int(later.optimizer.iterations) == 5
    for found, expected in zip(later.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_objective_does_not_contain_the_entropy_weight(tmp_path, blobs):
    """Models that learn nothing are equally good. Their training losses differ."""
    x, y = blobs
    space = HyperParameters()
    space.Choice("entropy_weight", [0.1, 1.0, 10.0])  # Instead of the range.
    hypermodel = Quick(features, 4, optimizer=still, seed=0, entropy_warmup=0)
    options = {"hyperparameters": space, "directory": tmp_path}
    tuner = keras_tuner.GridSearch(hypermodel, hypermodel.objective, **options)
    tuner.search(x, y, validation_data=(x, y), shuffle=False, verbose=0)
    by_weight = {
        trial.hyperparameters.values["entropy_weight"]: trial
        for trial in tuner.oracle.trials.values()
    }
    assert sorted(by_weight) == [0.1, 1.0, 10.0]
    trials = [by_weight[weight] for weight in sorted(by_weight)]
    for name in ("val_nll", "val_accuracy", "val_loss"):
        assert len({trial.metrics.get_best_value(name) for trial in trials}) == 1
    assert len({trial.score for trial in trials}) == 1
    losses = [trial.metrics.get_best_value("loss") for trial in trials]
    assert losses[0] > losses[1] + 0.1 > losses[2] + 0.2


def test_the_objective_does_not_contain_the_weight_decay(blobs):
    x, y = blobs
    found = []
    for strength in (0.0, 1e-2):
        space = HyperParameters()
        space.values = {"retain_l2": strength}
        start = {"kernel_initializer": "glorot_uniform"}
        model = Quick(features, 4, tune=["retain_l2"], seed=0, retain=start).build(space)
        found.append(model.evaluate(x, y, verbose=0, return_dict=True))
    without, decayed = found
    assert without["nll"] == decayed["nll"] == pytest.approx(without["loss"], rel=1e-5)
    assert decayed["loss"] > without["loss"] + 1e-3


@pytest.mark.long
def test_a_killed_search_resumes_and_its_best_model_loads(tmp_path):
    command = [sys.executable, str(WORKERS), "search", str(tmp_path)]

    def search():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, env=environment, stderr=subprocess.PIPE, timeout=180)
        trials = (tmp_path / "search").glob("trial_*/trial.json")
        return ended, {path.parent.name: json.loads(path.read_text()) for path in trials}

    (tmp_path / "kill").touch()
    killed, before = search()
    assert killed.returncode == -9, killed.stderr
    assert [before[name]["status"] for name in sorted(before)] == ["COMPLETED", "RUNNING"]
    finished, after = search()
    assert finished.returncode == 0, finished.stderr
    assert [trial["status"] for trial in after.values()] == ["COMPLETED"] * 3
    assert after["trial_0"] == before["trial_0"]
    repeated, interrupted = (x["trial_1"]["hyperparameters"]["values"] for x in (after, before))
    assert repeated == interrupted

    # The second process loaded the models of all trials, also of the first. This is a third one.
    result = json.loads((tmp_path / "result.json").read_text())
    log_p = np.array(result["log_probabilities"])
    scores = -log_p[:, np.arange(16), result["y"]].mean(-1)
    expected = sorted(trial["score"] for trial in after.values())
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    best = keras.models.load_model(tmp_path / "best.keras")
    np.testing.assert_allclose(best(np.array(result["x"])), log_p[0], atol=1e-5)
    found = best.layers[-1].get_config()["entropy_weight"]
    assert found == pytest.approx(result["entropy_weight"])
