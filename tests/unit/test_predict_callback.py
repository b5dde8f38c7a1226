"""`DropMaxPredict`: the mode is in force while a step runs, and never longer."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import DETERMINISTIC, GLOROT, MODES, by_functional, classifier, mean_nll

from tf_dropmax import DropMaxHead, DropMaxLoss, DropMaxPredict


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"jit_compile": True}, marks=pytest.mark.slow),
        {"run_eagerly": True},
        pytest.param({"steps_per_execution": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_predict_and_evaluate(blobs, settings):
    x, y = blobs
    model = classifier({"metrics": ["accuracy"], **settings})
    expected, plain = by_functional(model, x), model.predict(x, verbose=0)
    for mode in [*MODES, *MODES]:
        by_callback = {"verbose": 0, "callbacks": [DropMaxPredict(mode, samples=20)]}
        found = model.predict(x, **by_callback)
        result = model.evaluate(x, y, return_dict=True, **by_callback)
        if mode == "sampled":
            assert 1e-3 < np.abs(np.exp(found) - np.exp(expected["exact"])).max() < 0.6
            assert np.abs(found - model.predict(x, **by_callback)).max() > 1e-3
            continue
        np.testing.assert_allclose(found, expected[mode], atol=1e-5)
        assert result["loss"] == pytest.approx(mean_nll(expected[mode], y), rel=1e-4)
        accuracy = np.mean(expected[mode].argmax(1) == y)
        assert result["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    np.testing.assert_array_equal(model.predict(x, verbose=0), plain)
    assert model.evaluate(x, y, verbose=0)[0] == pytest.approx(mean_nll(plain, y), rel=1e-5)
    assert model.layers[-1].predict_mode == "expected"


@pytest.mark.slow
def test_validation_inside_fit_but_not_training(blobs):
    x, y = blobs

    def fit(*modes):
        settings = {"epochs": 2, "shuffle": False, "verbose": 0, "validation_data": (x, y)}
        callbacks = [DropMaxPredict(mode) for mode in modes]
        return classifier({}).fit(x, y, callbacks=callbacks, **settings).history

    plain = fit()
    for mode in ["exact", "sampled", "softmax"]:
        changed = fit(mode)
        assert changed["loss"] == plain["loss"]
        assert np.abs(np.subtract(changed["val_loss"], plain["val_loss"])).min() > 1e-4


class Failing(keras.callbacks.Callback):
    def __init__(self, where):
        super().__init__()
        setattr(self, where, self.fail)

    def fail(self, *args, **kwargs):
        raise RuntimeError("stopped")


@pytest.mark.parametrize("where", ["begin", "batch_begin", "batch_end", "end", "data"])
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("kind", ["predict", "test"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"jit_compile": True}, marks=pytest.mark.long),
        pytest.param({"run_eagerly": True}, marks=pytest.mark.long),
        pytest.param({"steps_per_execution": 2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_an_exception_leaves_the_mode_as_it_was(blobs, settings, kind, where, position):
    x, y = blobs
    model = classifier(settings)
    of_kind = {"predict": (model.predict, model.predict_on_batch), "test": (model.evaluate,)}
    use, *on_batch = of_kind[kind]
    arrays = (x,) if kind == "predict" else (x, y)
    before = use(*arrays, verbose=0)
    softmax = DropMaxPredict("softmax")
    in_softmax = use(*arrays, verbose=0, callbacks=[softmax])
    assert np.abs(in_softmax - before).max() > 1e-3

    def batches():
        yield tuple(array[:32] for array in arrays)
        raise RuntimeError("stopped")

    data, callbacks = arrays, [softmax]
    if where == "data":
        spec = (tf.TensorSpec((None, 6)), tf.TensorSpec((None,), tf.int64))[: len(arrays)]
        data = (tf.data.Dataset.from_generator(batches, output_signature=spec),)
    else:
        callbacks.insert(position, Failing(f"on_{kind}_{where}"))
    for following in (use, *on_batch):
        with pytest.raises((RuntimeError, tf.errors.UnknownError), match="stopped"):
            use(*data, verbose=0, callbacks=callbacks)
        assert model.layers[-1].predict_mode == "expected"
        quiet = {"verbose": 0} if following is use else {}
        np.testing.assert_allclose(following(*arrays, **quiet), before, atol=1e-5)
    np.testing.assert_array_equal(use(*arrays, verbose=0, callbacks=[softmax]), in_softmax)
    np.testing.assert_array_equal(use(*arrays, verbose=0), before)
    assert not {name for name in vars(model) if name.startswith("make_")}


@pytest.mark.parametrize("where", ["on_test_batch_begin", "on_test_batch_end"])
def test_the_function_of_a_stopped_evaluation_does_not_come_back(blobs, where):
    x, y = blobs
    model = classifier({})
    before = model.evaluate(x, y, verbose=0)
    with pytest.raises(RuntimeError, match="stopped"):
        model.evaluate(x, y, verbose=0, callbacks=[DropMaxPredict("softmax"), Failing(where)])
    model.compile("sgd", DropMaxLoss(reduction="sum"))
    assert model.evaluate(x, y, verbose=0) == pytest.approx(32 * before, rel=1e-5)


class Another(keras.callbacks.Callback):
    """Evaluates and predicts with the model before or after each of its batches."""

    def __init__(self, where, x, y):
        super().__init__()
        self.found, self.data = [], (x, y)
        setattr(self, f"on_predict_batch_{where}", self.predict)
        setattr(self, f"on_test_batch_{where}", self.evaluate)

    def predict(self, batch, logs=None):
        self.found.append(self.model.predict(self.data[0], verbose=0))

    def evaluate(self, batch, logs=None):
        state = [variable.numpy() for variable in self.model.metrics[0].variables]
        self.found.append(self.model.evaluate(*self.data, verbose=0))
        for variable, value in zip(self.model.metrics[0].variables, state, strict=True):
            variable.assign(value)


@pytest.mark.parametrize("kind", ["predict", "test"])
@pytest.mark.parametrize(
    ("where", "position"), [("begin", 0), ("begin", 1), ("end", 0), ("end", 1)]
)
def test_another_callback_uses_the_model(blobs, kind, where, position):
    """In the mode of the model. Directly before the step, that does not go unnoticed."""
    x, y = blobs
    model = classifier({})
    use, arrays = {"predict": (model.predict, (x,)), "test": (model.evaluate, (x, y))}[kind]
    plain = use(*arrays, verbose=0)
    exact = use(*arrays, verbose=0, callbacks=[DropMaxPredict("exact")])
    assert np.abs(exact - plain).max() > 1e-4
    other = Another(where, x, y)
    callbacks = [DropMaxPredict("exact")]
    callbacks.insert(position, other)
    if (where, position) == ("begin", 1):
        with pytest.raises(RuntimeError, match=r"'exact'.*put DropMaxPredict after it"):
            use(*arrays, verbose=0, callbacks=callbacks)
    else:
        found = use(*arrays, verbose=0, callbacks=callbacks)
        np.testing.assert_allclose(found, exact, rtol=1e-6)
    for each in (use(*arrays, verbose=0), *other.found):
        np.testing.assert_array_equal(each, plain)


def test_a_model_without_a_head_and_two_callbacks_are_refused():
    x, y = np.ones((4, 3)), np.arange(4)
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    plain.compile("sgd", "sparse_categorical_crossentropy")
    for use, arrays in ((plain.predict, (x,)), (plain.evaluate, (x, y)), (plain.fit, (x, y))):
        with pytest.raises(ValueError, match=r"at least one DropMaxHead.*sequential"):
            use(*arrays, verbose=0, callbacks=[DropMaxPredict("exact")])
    model, x = classifier(), np.ones((4, 6))
    with pytest.raises(ValueError, match="one DropMaxPredict"):
        model.predict(x, verbose=0, callbacks=[DropMaxPredict("exact"), DropMaxPredict("softmax")])
    expected = by_functional(model, x)
    for mode in DETERMINISTIC:
        found = model.predict(x, verbose=0, callbacks=[DropMaxPredict(mode)])
        np.testing.assert_allclose(found, expected[mode], atol=1e-5)


def test_a_used_callback_can_be_copied_without_its_model(blobs):
    """keras-tuner copies the callbacks of every trial."""
    x, y = blobs

    @keras.saving.register_keras_serializable()  # without a config: Keras cannot copy it
    class Model(keras.Model):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def call(self, x):
            return self.head(x)

    model = Model(DropMaxHead(4, seed=1, retain=GLOROT))
    model.compile("sgd", DropMaxLoss())
    callback = DropMaxPredict("exact", samples=7)
    model.evaluate(x, y, verbose=0, callbacks=[callback])
    again = copy.deepcopy(callback)
    assert (again.mode, again.samples, again.model) == ("exact", 7, None)
    found = model.evaluate(x, y, verbose=0, callbacks=[again])
    assert found == model.evaluate(x, y, verbose=0, callbacks=[callback])
