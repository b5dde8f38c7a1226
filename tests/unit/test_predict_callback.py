"""`DropMaxPredict`: the mode is in force while a step runs, and never longer."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import GLOROT, MODES, PAPER_START, by_functional, count_traces

from tf_dropmax import DropMaxHead, DropMaxLoss, DropMaxPredict, predict_mode, set_predict_mode


def small():
    model = keras.Sequential([keras.Input((6,)), DropMaxHead(4, seed=1, **PAPER_START)])
    model.compile("adam", DropMaxLoss())
    return model


@pytest.fixture(
    scope="module",
    params=[
        {},
        pytest.param({"jit_compile": True}, marks=pytest.mark.slow),
        {"run_eagerly": True},
        pytest.param({"steps_per_execution": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def trained(request, blobs):
    """One model for many tests: each must leave it in the mode in which it found it."""
    x, y = blobs
    features = keras.layers.Dense(8, "relu", kernel_initializer=keras.initializers.GlorotUniform(0))
    model = keras.Sequential([keras.Input((6,)), features, DropMaxHead(4, seed=1, retain=GLOROT)])
    model.compile(keras.optimizers.Adam(0.02), DropMaxLoss(), metrics=["accuracy"], **request.param)
    model.fit(x, y, epochs=2, shuffle=False, verbose=0)
    return model, x, y


def test_predict(trained, monkeypatch):
    model, x, _ = trained
    first = model.predict(x, verbose=0)

    def predictions():
        return {
            mode: model.predict(x, verbose=0, callbacks=[DropMaxPredict(mode, samples=20)])
            for mode in MODES
        }

    outputs = predictions()
    retraced = count_traces(model, monkeypatch)
    again = predictions()
    if not model.run_eagerly:
        assert not retraced
    for mode in ["expected", "exact", "softmax"]:
        np.testing.assert_array_equal(again[mode], outputs[mode])
    for mode in ["expected", "exact", "softmax"]:
        np.testing.assert_allclose(outputs[mode], by_functional(model, x)[mode], atol=1e-5)
    assert 1e-3 < np.abs(np.exp(outputs["sampled"]) - np.exp(outputs["exact"])).max() < 0.6
    for one in range(4):
        for other in range(one):
            assert np.abs(outputs[MODES[one]] - outputs[MODES[other]]).max() > 1e-3
    assert np.abs(again["sampled"] - outputs["sampled"]).max() > 1e-3
    np.testing.assert_array_equal(model.predict(x, verbose=0), first)
    assert model.layers[-1].predict_mode == "expected"


def test_evaluate(trained):
    model, x, y = trained
    plain = model.evaluate(x, y, verbose=0, return_dict=True)
    for mode in ["expected", "exact", "softmax"]:
        result = model.evaluate(x, y, verbose=0, return_dict=True, callbacks=[DropMaxPredict(mode)])
        log_p = by_functional(model, x)[mode]
        assert result["loss"] == pytest.approx(-log_p[np.arange(len(y)), y].mean(), rel=1e-4)
        assert result["accuracy"] == pytest.approx(np.mean(log_p.argmax(1) == y), abs=1e-6)
        assert (abs(result["loss"] - plain["loss"]) > 1e-3) == (mode != "expected")
    assert model.evaluate(x, y, verbose=0, return_dict=True) == plain


@pytest.mark.slow
def test_validation_inside_fit_but_not_training(blobs):
    x, y = blobs

    def fit(callbacks):
        model = small()
        history = model.fit(
            x, y, epochs=2, shuffle=False, verbose=0, validation_data=(x, y), callbacks=callbacks
        )
        return model, history.history

    model, plain = fit([])
    for mode in ["exact", "sampled", "softmax"]:
        _, changed = fit([DropMaxPredict(mode)])
        assert changed["loss"] == plain["loss"]
        assert np.abs(np.subtract(changed["val_loss"], plain["val_loss"])).min() > 1e-4
    assert model.evaluate(x, y, verbose=0) == pytest.approx(plain["val_loss"][-1], rel=1e-5)
    assert plain["val_loss"][-1] > plain["loss"][-1]  # no entropy term in it, and no masks


class Failing(keras.callbacks.Callback):
    def __init__(self, where):
        super().__init__()
        setattr(self, where, self.fail)

    def fail(self, *args, **kwargs):
        raise RuntimeError("stopped")


def failing_data(x):
    def batches():
        yield x[:32]
        yield x[32:64]
        raise RuntimeError("stopped")

    return tf.data.Dataset.from_generator(
        batches, output_signature=tf.TensorSpec((None, 6), "float32")
    )


@pytest.mark.parametrize(
    "where",
    [
        "on_predict_begin",
        "on_predict_batch_begin",
        "on_predict_batch_end",
        "on_predict_end",
        "data",
    ],
)
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("on_batch", [False, True])
def test_an_exception_leaves_the_mode_as_it_was(trained, monkeypatch, where, position, on_batch):
    model, x, _ = trained
    before = model.predict(x, verbose=0)
    by_softmax = model.predict(x, verbose=0, callbacks=[DropMaxPredict("softmax")])
    assert np.abs(by_softmax - before).max() > 1e-3
    callbacks = [DropMaxPredict("softmax")]
    if where != "data":
        callbacks.insert(position, Failing(where))
    retraced = count_traces(model, monkeypatch)
    with pytest.raises((RuntimeError, tf.errors.UnknownError), match="stopped"):
        model.predict(failing_data(x) if where == "data" else x, verbose=0, callbacks=callbacks)
    assert model.layers[-1].predict_mode == "expected"
    np.testing.assert_allclose(model(x), before, atol=1e-5)
    if on_batch:
        np.testing.assert_allclose(model.predict_on_batch(x), before, atol=1e-5)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    (callback,) = (each for each in callbacks if isinstance(each, DropMaxPredict))
    again = model.predict(x, verbose=0, callbacks=[callback])
    np.testing.assert_array_equal(again, by_softmax)
    if not model.run_eagerly and where != "data" and not on_batch:
        assert len(retraced) == 1  # the direct call
    assert not {name for name in vars(model) if name.startswith("make_")}


@pytest.mark.parametrize(
    "where", ["on_test_begin", "on_test_batch_begin", "on_test_batch_end", "on_test_end"]
)
def test_an_exception_in_validation_leaves_the_mode_as_it_was(blobs, where):
    x, y = blobs
    model = small()
    before = model.evaluate(x, y, verbose=0)
    with pytest.raises(RuntimeError, match="stopped"):
        model.evaluate(x, y, verbose=0, callbacks=[DropMaxPredict("softmax"), Failing(where)])
    assert model.evaluate(x, y, verbose=0) == before
    with pytest.raises(RuntimeError, match="stopped"):
        model.evaluate(x, y, verbose=0, callbacks=[DropMaxPredict("softmax"), Failing(where)])
    model.reset_metrics()  # Before Keras 3.13, `test_on_batch` adds to what was evaluated before.
    assert model.test_on_batch(x, y) == pytest.approx(before, rel=1e-5)
    with pytest.raises(RuntimeError, match="stopped"):
        model.evaluate(x, y, verbose=0, callbacks=[DropMaxPredict("softmax"), Failing(where)])
    # What is left over must not bring the old functions back.
    model.compile("adam", DropMaxLoss(reduction="sum"))
    assert model.evaluate(x, y, verbose=0) == pytest.approx(32 * before, rel=1e-5)


def test_an_evaluation_within_an_evaluation(blobs):
    """Started by another callback. Each evaluation has its own mode."""
    x, y = blobs
    model = small()
    plain, exact = (
        model.evaluate(x, y, verbose=0),
        model.evaluate(x, y, verbose=0, callbacks=[DropMaxPredict("exact")]),
    )
    inner = []

    class Nested(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            if batch == 1:
                state = [v.numpy() for v in model.metrics[0].variables]
                inner.append(model.evaluate(x, y, verbose=0))
                for variable, value in zip(model.metrics[0].variables, state, strict=True):
                    variable.assign(value)

    outer = model.evaluate(x, y, verbose=0, callbacks=[DropMaxPredict("exact"), Nested()])
    assert inner == [plain]
    assert outer == pytest.approx(exact, rel=1e-6)
    assert abs(exact - plain) > 1e-4
    assert model.evaluate(x, y, verbose=0) == plain


def test_every_head_of_a_nested_model_is_switched(rng):
    x = rng.normal(size=(8, 5)).astype("float32")

    class Wrapping(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.head = DropMaxHead(2, retain=GLOROT)

        def call(self, inputs):
            return self.head(inputs)

    inputs = keras.Input((5,))
    inner = keras.Sequential([keras.Input((5,)), DropMaxHead(3, retain=GLOROT)])
    outputs = [inner(inputs), Wrapping()(inputs), DropMaxHead(4, retain=GLOROT)(inputs)]
    model = keras.Model(inputs, outputs)
    before, after = (
        model.predict(x, verbose=0),
        model.predict(x, verbose=0, callbacks=[DropMaxPredict("softmax")]),
    )
    for one, other in zip(before, after, strict=True):
        assert np.abs(one - other).max() > 1e-3


def test_bad_use():
    for arguments in [("mean",), (None,), ("sampled", 0), ("sampled", 1.5)]:
        with pytest.raises(ValueError, match=r"must be.*Received"):
            DropMaxPredict(*arguments)
        with (
            pytest.raises(ValueError, match=r"must be.*Received"),
            predict_mode(DropMaxHead(3), *arguments),
        ):
            pass
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    x, y = np.ones((4, 3)), np.ones((4, 2))
    for use in [
        lambda: model.predict(x, verbose=0, callbacks=[DropMaxPredict("exact")]),
        lambda: model.evaluate(x, y, verbose=0, callbacks=[DropMaxPredict("exact")]),
        lambda: model.fit(x, y, verbose=0, callbacks=[DropMaxPredict("exact")]),
        lambda: predict_mode(model, "exact").__enter__(),
    ]:
        with pytest.raises(ValueError, match=r"at least one DropMaxHead.*sequential"):
            use()
    with pytest.raises(ValueError, match="Keras model"):
        predict_mode("model", "exact").__enter__()
    model = keras.Sequential([keras.Input((3,)), DropMaxHead(2)])
    with pytest.raises(ValueError, match="one DropMaxPredict"):
        model.predict(x, verbose=0, callbacks=[DropMaxPredict("exact"), DropMaxPredict("softmax")])
    assert model.predict(x, verbose=0).shape == (4, 2)


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
    assert abs(found - model.evaluate(x, y, verbose=0)) > 1e-4


@pytest.mark.parametrize("recovery", ["predict_mode", "set_predict_mode", "callback"])
def test_a_step_that_never_ran_is_not_kept(blobs, recovery):
    x, _ = blobs
    model = small()
    before = model.predict(x, verbose=0)
    with pytest.raises(ValueError, match="one DropMaxPredict"):
        model.predict(x, verbose=0, callbacks=[DropMaxPredict("exact"), DropMaxPredict("softmax")])
    if recovery == "predict_mode":
        with predict_mode(model, "exact"):
            exact = model.predict(x, verbose=0)
    elif recovery == "set_predict_mode":
        set_predict_mode(model, "exact")
        exact = model.predict(x, verbose=0)
        set_predict_mode(model, "expected")
    else:
        exact = model.predict(x, verbose=0, callbacks=[DropMaxPredict("exact")])
    assert np.abs(exact - before).max() > 1e-3
    for _ in range(2):
        np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    assert "make_predict_function" not in vars(model)


@pytest.mark.parametrize("kind", ["predict", "test"])
@pytest.mark.parametrize("first", [True, False])
def test_another_prediction_before_the_step(blobs, kind, first):
    """By another callback. It runs in the mode of the model, and does not go unnoticed."""
    x, y = blobs
    model = small()
    plain = model.predict(x, verbose=0)
    found = []

    class Other(keras.callbacks.Callback):
        def on_predict_batch_begin(self, batch, logs=None):
            found.append(model.predict(x, verbose=0))

        def on_test_batch_begin(self, batch, logs=None):
            state = [v.numpy() for v in model.metrics[0].variables]
            model.evaluate(x, y, verbose=0)
            for variable, value in zip(model.metrics[0].variables, state, strict=True):
                variable.assign(value)

    arguments = (x,) if kind == "predict" else (x, y)
    call = getattr(model, "predict" if kind == "predict" else "evaluate")
    exact = call(*arguments, verbose=0, callbacks=[DropMaxPredict("exact")])
    callbacks = [Other(), DropMaxPredict("exact")] if first else [DropMaxPredict("exact"), Other()]
    if first:
        again = call(*arguments, verbose=0, callbacks=callbacks)
        np.testing.assert_allclose(again, exact, rtol=1e-6)
    else:
        with pytest.raises(RuntimeError, match=r"'exact'.*put DropMaxPredict after it"):
            call(*arguments, verbose=0, callbacks=callbacks)
    np.testing.assert_array_equal(model.predict(x, verbose=0), plain)
    for each in found:
        np.testing.assert_array_equal(each, plain)
