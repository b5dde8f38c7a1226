"""Search spaces, tuners, objectives; a search that is killed and goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import pytest
import tensorflow as tf
from keras_tuner import HyperParameters

from tf_dropmax import DropMaxHead, tuning
from tf_dropmax.tuning import DropMaxHyperModel, dropmax_head


def features(hp):
    initializer = keras.initializers.GlorotUniform(seed=0)
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "relu", kernel_initializer=initializer)])


class Quick(DropMaxHyperModel):
    """Traces no functions, which would take longer than all the rest."""

    def build(self, hp):
        model = super().build(hp)
        model.run_eagerly = True
        return model


def still(hp):
    return keras.optimizers.SGD(0.0)


def test_the_space(rng):
    space = HyperParameters()
    dropmax_head(space, 3)
    (entropy_weight,) = space.space
    draws = [entropy_weight.random_sample(seed) for seed in range(2000)]
    assert 0.01 <= min(draws) < 0.0105
    assert 9.5 < max(draws) <= 10
    np.testing.assert_allclose(np.quantile(np.log10(draws), [0.25, 0.5, 0.75]), [-1.25, -0.5, 0.25], atol=0.15)

    many = HyperParameters()
    dropmax_head(many, 3000)
    default = float(DropMaxHead(3000).entropy_weight)
    (entropy_weight,) = many.space
    found = [entropy_weight.min_value, entropy_weight.default, entropy_weight.max_value]
    np.testing.assert_allclose(found, [default / 100, default, 10 * default])

    dropmax_head(space, 3, tune=tuning.TUNABLE)
    assert [entry.name for entry in space.space] == [*tuning.TUNABLE[:3], "auxiliary_weight", "retain_l2"]
    assert space.values == {"entropy_weight": 1.0, "temperature": 0.1, "posterior": "prior", "retain_l2": 0.0}


def test_the_head_has_what_was_drawn():
    space = HyperParameters()
    space.values = {
        "entropy_weight": 3.0,
        "temperature": 0.5,
        "posterior": "label",
        "auxiliary_weight": 0.03,
        "retain_l2": 1e-3,
    }
    head = dropmax_head(space, 3, tune=tuning.TUNABLE, name="mine")
    assert (head.units, head.name, head.posterior) == (3, "mine", "label")
    found = [float(head.entropy_weight), float(head.temperature), float(head.auxiliary_weight)]
    np.testing.assert_allclose(found, [3.0, 0.5, 0.03], rtol=1e-6)
    assert head.retain_kernel_regularizer.l2 == pytest.approx(1e-3)
    assert head.kernel_regularizer is None

    space.values = {**space.values, "posterior": "prior", "retain_l2": 0.0}
    head = dropmax_head(space, 3, tune=tuning.TUNABLE)
    assert (head.posterior, head.retain_kernel_regularizer) == ("prior", None)
    with space.name_scope("second"):
        assert float(dropmax_head(space, 3).entropy_weight) == 1.0


@pytest.mark.parametrize(
    ("tune", "kwargs", "message"),
    [
        ("entropy_weight", {}, "must be a collection of names"),
        (["units"], {}, "must be a collection of names"),
        (["entropy_weight"], {"retain_probability": 0.4}, "must not name what has no effect"),
        (["entropy_weight", "temperature"], {"stochastic": False}, r"no effect.*Received: tune=\['temperature'\]"),
    ],
)
def test_what_cannot_be_tuned(tune, kwargs, message):
    with pytest.raises(ValueError, match=message):
        dropmax_head(HyperParameters(), 3, tune=tune, **kwargs)


def test_wrong_arguments():
    for tune, given in (("entropy_weight", "entropy_weight"), ("posterior", "auxiliary_weight")):
        with pytest.raises(TypeError, match=f"multiple values for keyword argument '{given}'"):
            dropmax_head(HyperParameters(), 3, tune=[tune], **{given: 1.0})
    with pytest.raises(ValueError, match="`features` must be a function"):
        DropMaxHyperModel(features(None), 3)
    with pytest.raises(ValueError, match="an optimizer of its own"):
        DropMaxHyperModel(features, 3, optimizer=keras.optimizers.Adam())
    for model in (None, keras.Sequential([keras.layers.Dense(3)])):
        with pytest.raises(ValueError, match="`features` must return a functional or sequential model"):
            DropMaxHyperModel(lambda hp, model=model: model, 3).build(HyperParameters())
    x = keras.Input((6,))
    with pytest.raises(ValueError, match=r"a model with one output\. Received: 2 outputs"):
        DropMaxHyperModel(lambda hp: keras.Model(x, [x + 1, x + 2]), 3).build(HyperParameters())


def test_trials_share_no_trained_weights(tmp_path, blobs):
    one = features(None)
    hypermodel = Quick(lambda hp: one, 4)
    tuner = keras_tuner.RandomSearch(hypermodel, hypermodel.objective, max_trials=2, directory=tmp_path)
    with pytest.raises(ValueError, match="`features` must return a new model at every call"):
        tuner.search(*blobs, validation_data=blobs, verbose=0)
    one.trainable = False  # as are the features of another's model, to which nothing happens
    models = [hypermodel.build(HyperParameters()) for _ in range(2)]
    assert models[0].layers[-1] is not models[1].layers[-1]


def test_dense_labels(tmp_path, blobs):
    x, y = blobs
    found = []
    for name, labels in (("sparse", y), ("dense", np.eye(4, dtype="float32")[y])):
        hypermodel = Quick(features, 4, optimizer=still, seed=0)
        tuner = keras_tuner.RandomSearch(
            hypermodel, hypermodel.objective, max_trials=1, seed=0, directory=tmp_path, project_name=name
        )
        tuner.search(x, labels, validation_data=(x, labels), verbose=0)
        (trial,) = tuner.oracle.trials.values()
        assert trial.status == "COMPLETED"
        found.append([trial.metrics.get_best_value(name) for name in ("val_nll", "val_accuracy")])
    np.testing.assert_allclose(*found, rtol=1e-6)


TUNERS = {"BayesianOptimization": {"max_trials": 3, "num_initial_points": 2}, "Hyperband": {"max_epochs": 2, "factor": 2}}


@pytest.mark.filterwarnings("ignore:The optimal value found:sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", TUNERS)
def test_tuners_that_learn_from_their_trials(tmp_path, blobs, name):
    """Below are a GridSearch and a RandomSearch."""
    x, y = blobs
    train, test = slice(0, 64), slice(64, 160)
    tune = tuning.TUNABLE if name == "BayesianOptimization" else ["entropy_weight"]
    hypermodel = Quick(features, 4, optimizer=lambda hp: keras.optimizers.Adam(0.01), tune=tune)
    tuner = getattr(keras_tuner, name)(hypermodel, hypermodel.objective, seed=1, directory=tmp_path, **TUNERS[name])
    tuner.search(x[train], y[train], validation_data=(x[test], y[test]), verbose=0)
    trials = list(tuner.oracle.trials.values())
    assert [trial.status for trial in trials] == ["COMPLETED"] * TUNERS[name].get("max_trials", 5)
    values = [trial.hyperparameters.values["entropy_weight"] for trial in trials]
    assert all(0.01 <= value <= 10 for value in values)
    assert len(set(values)) == len(values) - (name == "Hyperband")  # which goes on with one of its trials
    p = np.exp(tuner.get_best_models()[0](x[test]))
    score = -np.log(p[np.arange(96), y[test]]).mean()
    assert score == pytest.approx(min(trial.score for trial in trials), rel=1e-5)


def test_a_model_goes_on_with_its_optimizer(tmp_path, blobs):
    """As in Hyperband, which loads the weights file of an earlier trial into the model of a later one."""
    x, y = blobs
    hypermodel = Quick(features, 4)
    model, later = (hypermodel.build(HyperParameters()) for _ in range(2))
    model.fit(x, y, verbose=0)
    model.save_weights(tmp_path / "checkpoint.weights.h5")
    later.load_weights(tmp_path / "checkpoint.weights.h5")
    assert int(later.optimizer.iterations) == 5
    for found, expected in zip(later.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_grid_of_a_range_is_the_default_and_ten_values(tmp_path):
    """As the module says; of the oracle alone, without a model."""
    space = HyperParameters()
    dropmax_head(space, 3)
    oracle = keras_tuner.oracles.GridSearchOracle(hyperparameters=space)
    oracle._set_project_dir(tmp_path, "grid")
    oracle.verbose = 0
    values = []
    while (trial := oracle.create_trial("one")).status == "RUNNING":
        values.append(trial.hyperparameters.values["entropy_weight"])
        oracle.update_trial(trial.trial_id, {"default_objective": 0.0})
        trial.status = "COMPLETED"
        oracle.end_trial(trial)
    assert values[0] == 1
    np.testing.assert_allclose(sorted(values[1:]), 10 ** np.linspace(-1.85, 0.85, 10))


class Points(tuning.GridSearch):
    """Without models, in a grid of 6 points; the first trial finds one of the axes, as `HyperModel.fit` would."""

    def __init__(self, directory):
        space = HyperParameters()
        space.Choice("posterior", ["prior", "label"])
        with space.conditional_scope("posterior", ["label"]):
            space.Choice("auxiliary_weight", [0.1, 1.0])
        super().__init__(hyperparameters=space, directory=directory, project_name="grid")

    def run_trial(self, trial, ran, moment, verbose):
        trial.hyperparameters.Choice("batch_size", [16, 32])
        ran.append(trial.trial_id)
        moment()
        return float(len(ran))


def test_a_grid_search_goes_on_from_every_moment(tmp_path, monkeypatch):
    """From a kill before a file takes the place of the one before, which is after the last one did, or in a trial."""
    rename = tf.io.gfile.rename
    moments, stop = 0, None

    def moment():
        nonlocal moments
        moments += 1
        if moments == stop:
            raise KeyboardInterrupt

    def interrupted(*args, **kwargs):
        moment()
        rename(*args, **kwargs)

    monkeypatch.setattr(tf.io.gfile, "rename", interrupted)

    def search(name, ran):
        tuner = Points(tmp_path / name)
        tuner.search(ran, moment, verbose=0)
        return tuner

    def values(tuner):
        return {name: trial.hyperparameters.values for name, trial in tuner.oracle.trials.items()}

    whole = []
    grid = values(search("whole", whole))
    assert whole == sorted(grid)
    assert len({str(point) for point in grid.values()}) == len(grid) == 6
    for last in range(1, moments + 1):
        before, after, moments, stop = [], [], 0, last
        with pytest.raises(KeyboardInterrupt):
            search(str(last), before)
        files = [json.loads(path.read_text()) for path in (tmp_path / str(last)).glob("grid/trial_*/trial.json")]
        finished = {trial["trial_id"] for trial in files if trial["status"] == "COMPLETED"}
        stop = None
        tuner = search(str(last), after)
        assert values(tuner) == grid
        assert sorted(after) == sorted(set(grid) - finished)
        assert len(before) - len(finished) in (0, 1)
        for name, trial in tuner.oracle.trials.items():
            assert trial.status == "COMPLETED"
            assert trial.score == 1 + (after.index(name) if name in after else before.index(name))
    assert last > 40


def test_a_grid_search_goes_on_with_its_models(tmp_path, blobs):
    x, y = blobs

    def search(name, stop):
        space = HyperParameters()
        space.Choice("entropy_weight", [0.1, 1.0, 10.0])
        hypermodel = Quick(features, 4, seed=0)
        tuner = tuning.GridSearch(
            hypermodel, hypermodel.objective, hyperparameters=space, directory=tmp_path, project_name=name
        )

        def end(batch, logs):
            if len(tuner.oracle.trials) == stop and batch == 2:
                raise KeyboardInterrupt

        callbacks = [keras.callbacks.LambdaCallback(on_train_batch_end=end)]
        tuner.search(x, y, validation_data=(x, y), shuffle=False, callbacks=callbacks, verbose=0)
        return tuner

    with pytest.raises(KeyboardInterrupt):
        search("stopped", 2)
    stopped, whole = (search(name, None).oracle.trials for name in ("stopped", "whole"))
    assert sorted(stopped) == sorted(whole) == ["0000", "0001", "0002"]
    for name, trial in whole.items():
        assert stopped[name].hyperparameters.values == trial.hyperparameters.values
        assert stopped[name].score == pytest.approx(trial.score, rel=1e-5)


def test_lambda_alone_gains_nothing(tmp_path, blobs):
    """Of models that learn nothing, a tuner finds all as good; by the training loss the largest lambda would have won."""
    x, y = blobs
    space = HyperParameters()
    space.Choice("entropy_weight", [0.1, 1.0, 10.0])  # in place of the range
    hypermodel = Quick(features, 4, optimizer=still, seed=0)
    tuner = keras_tuner.GridSearch(hypermodel, hypermodel.objective, hyperparameters=space, directory=tmp_path)
    tuner.search(x, y, validation_data=(x, y), shuffle=False, verbose=0)
    trials = sorted(tuner.oracle.trials.values(), key=lambda trial: trial.hyperparameters.values["entropy_weight"])
    assert [trial.hyperparameters.values["entropy_weight"] for trial in trials] == [0.1, 1.0, 10.0]
    for name in ("val_nll", "val_accuracy", "val_loss"):
        assert len({trial.metrics.get_best_value(name) for trial in trials}) == 1
    assert len({trial.score for trial in trials}) == 1
    losses = [trial.metrics.get_best_value("loss") for trial in trials]
    assert losses[0] > losses[1] + 0.1 > losses[2] + 0.2


def test_the_objective_does_not_hold_weight_decay(blobs):
    x, y = blobs
    found = []
    for strength in (0.0, 1e-2):
        space = HyperParameters()
        space.values = {"retain_l2": strength}
        model = Quick(features, 4, tune=["retain_l2"], seed=0).build(space)
        found.append(model.evaluate(x, y, verbose=0, return_dict=True))
    without, decayed = found
    assert without["nll"] == decayed["nll"] == pytest.approx(without["loss"], rel=1e-5)
    assert decayed["loss"] > without["loss"] + 1e-3


def test_a_killed_search_goes_on_and_its_best_model_loads(tmp_path):
    command = [sys.executable, str(Path(__file__).parent / "workers.py"), "search", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def trials():
        return {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "search").glob("trial_*/trial.json")}

    (tmp_path / "kill").touch()
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert killed.returncode == -9, killed.stderr
    before = trials()
    assert [before[name]["status"] for name in sorted(before)] == ["COMPLETED", "RUNNING"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert finished.returncode == 0, finished.stderr
    after = trials()
    assert [after[name]["status"] for name in sorted(after)] == ["COMPLETED"] * 3
    assert after["trial_0"] == before["trial_0"]
    assert after["trial_1"]["hyperparameters"]["values"] == before["trial_1"]["hyperparameters"]["values"]

    # The second process had all models from the folder, that of the first trial too; and this is a third process.
    result = json.loads((tmp_path / "result.json").read_text())
    scores = [-np.array(rows)[np.arange(16), result["y"]].mean() for rows in result["log_probabilities"]]
    np.testing.assert_allclose(scores, sorted(trial["score"] for trial in after.values()), rtol=1e-5)
    best = keras.models.load_model(tmp_path / "best.keras")
    np.testing.assert_allclose(best(np.array(result["x"])), result["log_probabilities"][0], atol=1e-5)
    assert float(best.layers[-1].entropy_weight) == pytest.approx(result["entropy_weight"])
