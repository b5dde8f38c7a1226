"""Search spaces, tuners, objectives, and searches that are resumed."""

import json
import pickle
import re
import subprocess
import sys

import keras
import keras_tuner
import numpy as np
import pytest
from keras_tuner import HyperParameters

from tf_dropmax import tuning
from tf_dropmax.tuning import DropMaxHyperModel, dropmax_head


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


@pytest.mark.parametrize(
    ("units", "entropy_weight", "auxiliary_weight"),
    [(3, (0.01, 1, 10), (0.01, 0.1, 1)), (3000, (1e-4, 1e-2, 0.1), (1e-4, 1e-3, 1e-2))],
)
def test_the_space(units, entropy_weight, auxiliary_weight):
    space = HyperParameters()
    dropmax_head(space, units)
    assert list(space.values) == ["entropy_weight"]
    dropmax_head(space, units, tune=tuning.TUNABLE)
    assert space.values == {
        "entropy_weight": pytest.approx(entropy_weight[1]),
        "temperature": 0.1,
        "posterior": "prior",
        "retain_l2": 0.0,
    }
    entries = {entry.name: entry for entry in space.space}
    ranges = {
        "entropy_weight": entropy_weight,
        "temperature": (0.05, 0.1, 1),
        "auxiliary_weight": auxiliary_weight,
    }
    for name, expected in ranges.items():
        entry = entries[name]
        found = [entry.min_value, entry.default, entry.max_value]
        np.testing.assert_allclose(found, expected)
        assert entry.sampling == "log"


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


def test_dense_labels(blobs):
    x, y = blobs
    found = []
    for labels in (y, np.eye(4)[y]):
        model = Quick(features, 4, seed=0).build(HyperParameters())
        model.fit(x, labels, shuffle=False, verbose=0)
        found.append(model.evaluate(x, labels, verbose=0))
    np.testing.assert_allclose(*found, rtol=1e-6)


TUNERS = {
    "RandomSearch": {"max_trials": 3},
    "BayesianOptimization": {"max_trials": 3, "num_initial_points": 2},
    "Hyperband": {"max_epochs": 2, "factor": 2},
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The optimal value found:sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", TUNERS)
def test_a_search_is_resumed_and_its_best_model_loads(tmp_path, blobs, name):
    """It was interrupted in its second trial."""
    x, y = blobs
    train, test = slice(0, 64), slice(64, 160)
    tune = ["entropy_weight"] if name == "Hyperband" else tuning.TUNABLE

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
    hypermodel = Quick(features, 4, optimizer=still, seed=0, warmup_steps=0)
    options = {"hyperparameters": space, "directory": tmp_path}
    tuner = keras_tuner.GridSearch(hypermodel, hypermodel.objective, **options)
    tuner.search(x, y, validation_data=(x, y), shuffle=False, verbose=0)
    trials = sorted(
        tuner.oracle.trials.values(),
        key=lambda trial: trial.hyperparameters.values["entropy_weight"],
    )
    for name in ("val_nll", "val_accuracy", "val_loss"):
        assert len({trial.metrics.get_best_value(name) for trial in trials}) == 1
    assert len({trial.score for trial in trials}) == 1
    losses = [trial.metrics.get_best_value("loss") for trial in trials]
    assert len(losses) == 3
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
