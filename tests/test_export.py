"""`model.export`, and the runtimes that load what it writes."""

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

import tf_dropmax
from tf_dropmax import DropMaxHead


def saved_model(path):
    artifact = tf.saved_model.load(path)
    return lambda x: artifact.serve(x).numpy()


def litert(path):
    runner = Interpreter(path).get_signature_runner()
    (name,) = runner.get_input_details()
    (output,) = runner.get_output_details()
    return lambda x: runner(**{name: x})[output]


def onnx(path):
    session = onnxruntime.InferenceSession(path)
    return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]


FORMATS = {"tf_saved_model": ("", saved_model), "litert": (".tflite", litert), "onnx": (".onnx", onnx)}


def build(shape=(6,), **kwargs):
    """Retain probabilities of all sizes, as if it was trained."""
    initializers = {"kernel_initializer": "random_normal", "retain_kernel_initializer": keras.initializers.RandomNormal(0, 2)}
    return keras.Sequential(
        [keras.Input(shape), keras.layers.Dense(8, "relu"), DropMaxHead(4, seed=1, **{**initializers, **kwargs})]
    )


@pytest.fixture
def exported(tmp_path):
    """Exports a model, and gives what the format's own runtime makes of the file."""

    def export(model, kind):
        suffix, load = FORMATS[kind]
        path = str(tmp_path / f"model{suffix}")
        model.export(path, format=kind, verbose=False)
        return load(path)

    return export


def agree(model, run, x):
    for batch in (x, 5 * x[:1]):  # of any size
        found = run(batch)
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.exp(found).sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(found, model(batch), atol=1e-5)
        np.testing.assert_array_equal(found, run(batch))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["expected", "exact", "softmax"])
def test_every_runtime_predicts_as_keras_does(exported, blobs, mode, kind):
    model = build(predict_mode=mode)
    found = model(blobs[0])
    if mode != "expected":
        with tf_dropmax.predict_mode(model, "expected"):
            assert np.abs(found - model(blobs[0])).max() > 1e-3
    agree(model, exported(model, kind), blobs[0])


@pytest.mark.parametrize("kind", FORMATS)
def test_random_dropmax_on_sequences(exported, rng, kind):
    x = rng.normal(size=(3, 5, 6)).astype("float32")
    model = build((5, 6), retain_probability=0.4, use_bias=False)
    model(x)  # keras exports no model to ONNX that was never called
    agree(model, exported(model, kind), x)


def test_drawn_masks_are_for_saved_models_only(exported, blobs):
    x, _ = blobs
    model = build(predict_mode="sampled")
    run = exported(model, "tf_saved_model")
    first, second = run(x), run(x)
    np.testing.assert_allclose(np.exp(first).sum(-1), 1, atol=1e-5)
    assert np.abs(first - second).max() > 1e-3
    for kind in ("onnx", "litert"):
        with pytest.raises(ValueError, match=f"format '{kind}' cannot draw masks"):
            exported(model, kind)


def test_an_exported_model_still_changes_its_mode(exported, blobs):
    x, _ = blobs
    model = build()
    head = model.layers[-1]
    expected = model.predict(x, verbose=0)
    run = exported(model, "tf_saved_model")
    head.predict_mode = "softmax"
    assert np.abs(model.predict(x, verbose=0) - expected).max() > 1e-3
    assert np.abs(model(x) - expected).max() > 1e-3
    np.testing.assert_allclose(run(x), expected, atol=1e-6)  # but not what was written


def test_a_function_within_the_model_is_not_tied_to_the_mode(exported, blobs):
    x, _ = blobs

    class Model(keras.Model):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        @tf.function(reduce_retracing=True)
        def call(self, inputs):
            return self.inner(inputs)

    inner = build()
    model = Model(inner)
    expected = model(x)
    run = exported(model, "tf_saved_model")
    np.testing.assert_allclose(run(x), expected, atol=1e-6)
    inner.layers[-1].predict_mode = "softmax"
    np.testing.assert_allclose(model(x[:5]), inner(x[:5]), atol=1e-6)  # by the trace of the export
    assert np.abs(model(x[:5]) - expected[:5]).max() > 1e-3
