"""`model.export`, and the runtimes that load what it writes."""

from pathlib import Path

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
import tf2onnx
from ai_edge_litert.interpreter import Interpreter
from models import DETERMINISTIC
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph
from onnxruntime.transformers.float16 import convert_float_to_float16
from packaging.version import Version

import tf_dropmax
from tf_dropmax import DropMaxHead, set_predict_mode


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


# Older versions of Keras export nothing to LiteRT, and tf2onnx takes none of their models.
NEW_KERAS = Version(keras.__version__) >= Version("3.13")
FORMATS = {
    "tf_saved_model": ("", saved_model),
    "litert": (".tflite", litert),
    "onnx": (".onnx", onnx),
}


def build(shape=(6,), **kwargs):
    """Retain probabilities of all sizes, as if it was trained."""
    retain = {"kernel_initializer": keras.initializers.RandomNormal(0, 2)}
    settings = {"kernel_initializer": "random_normal", "retain": retain, "seed": 1}
    hidden = keras.layers.Dense(8, "relu")
    return keras.Sequential([keras.Input(shape), hidden, DropMaxHead(4, **settings | kwargs)])


def convert_to_litert(model, path):
    Path(path).write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())


@pytest.fixture
def exported(tmp_path):
    """Exports a model, and gives what the format's own runtime makes of the file."""

    def export(model, kind):
        suffix, load = FORMATS[kind]
        path = str(tmp_path / f"model{suffix}")
        if kind == "litert" and not NEW_KERAS:
            convert_to_litert(model, path)
        else:
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
@pytest.mark.parametrize("mode", DETERMINISTIC)
def test_every_runtime_predicts_as_keras_does(exported, blobs, mode, kind):
    x, _ = blobs
    model = build(predict_mode=mode)
    found = model(x)
    if mode != "expected":
        with tf_dropmax.predict_mode(model, "expected"):
            assert np.abs(found - model(x)).max() > 1e-3
    agree(model, exported(model, kind), x)


@pytest.mark.parametrize("kind", FORMATS)
def test_random_dropmax_on_sequences(exported, rng, kind):
    x = rng.normal(size=(3, 5, 6)).astype("float32")
    model = build((5, 6), retain_probability=0.4, use_bias=False)
    model(x)  # keras exports no model to ONNX that was never called
    agree(model, exported(model, kind), x)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [("onnx", InvalidGraph, "No Op registered"), ("litert", RuntimeError, "Flex delegate")],
)
def test_what_cannot_draw_masks_does_not_load(exported, kind, error, message):
    """These formats have no random numbers that a seed determines."""
    model = build(predict_mode="sampled")
    model(np.ones((1, 6), "float32"))  # Keras exports no model to ONNX that was never called.
    with pytest.raises(error, match=message):
        exported(model, kind)(np.ones((1, 6), "float32"))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("mode", ["expected", "softmax"])
def test_litert_with_16_bit_activations(blobs, mode, static):
    x, _ = blobs
    model = build(predict_mode=mode, kernel_initializer=keras.initializers.RandomNormal(0, 1))
    function = tf.function(lambda x: model(x))
    traced = function.get_concrete_function(tf.TensorSpec((1 if static else None, 6)))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([traced], function)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([row[np.newaxis]] for row in x)
    converter.target_spec.supported_ops = [
        tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8,
        tf.lite.OpsSet.TFLITE_BUILTINS,  # LiteRT computes the log-softmax with floats.
    ]
    interpreter = Interpreter(model_content=converter.convert())
    interpreter.allocate_tensors()
    (given,), (wanted,) = interpreter.get_input_details(), interpreter.get_output_details()
    found = []
    for row in x[:64]:
        interpreter.set_tensor(given["index"], row[np.newaxis])
        interpreter.invoke()
        found.append(interpreter.get_tensor(wanted["index"])[0])
    expected = np.exp(model(x[:64]))
    assert expected.std(0).max() > 0.1
    np.testing.assert_allclose(np.exp(found), expected, atol=0.02)


def as_onnx(model, **kwargs):
    signature = [tf.TensorSpec((None, 6), tf.float32, name="x")]
    return tf2onnx.convert.from_function(tf.function(model), signature, **kwargs)[0]


@pytest.mark.parametrize("mode", DETERMINISTIC)
def test_onnx_with_the_smallest_set_of_operations(tmp_path, blobs, mode):
    model, path = build(predict_mode=mode), str(tmp_path / "model.onnx")
    as_onnx(model, opset=8, output_path=path)
    agree(model, onnx(path), blobs[0])


@pytest.mark.parametrize("mode", ["expected", "softmax"])  # The conversion breaks loops.
def test_onnx_in_float16(blobs, mode):
    model, (x, _) = build(predict_mode=mode), blobs
    small = convert_float_to_float16(as_onnx(model)).SerializeToString()
    (found,) = onnxruntime.InferenceSession(small).run(None, {"x": x.astype("float16")})
    np.testing.assert_allclose(np.exp(found), np.exp(model(x)), atol=0.01)


def test_other_ways_to_export_give_the_mode_too(tmp_path, blobs):
    x, _ = blobs
    model = build(predict_mode="exact")
    path = str(tmp_path / "model")
    convert_to_litert(model, path)
    agree(model, litert(path), x)
    if NEW_KERAS:
        model.output_names = ["output"]  # tf2onnx needs the name for every model of Keras 3.
        tf2onnx.convert.from_keras(model, output_path=path)
        agree(model, onnx(path), x)
    archive = keras.export.ExportArchive()
    archive.track(model)
    signature = [tf.TensorSpec((None, 6), tf.float32)]
    archive.add_endpoint("probabilities", lambda x: tf.exp(model(x)), input_signature=signature)
    archive.write_out(tmp_path / "archive", verbose=False)
    layer = keras.layers.TFSMLayer(tmp_path / "archive", call_endpoint="probabilities")
    np.testing.assert_allclose(layer(x), np.exp(model(x)), atol=1e-5)


def test_drawn_masks_in_a_saved_model(exported, blobs):
    x, _ = blobs
    run = exported(build(predict_mode="sampled"), "tf_saved_model")
    first, second = run(x), run(x)
    np.testing.assert_allclose(np.exp(first).sum(-1), 1, atol=1e-5)
    assert np.abs(first - second).max() > 1e-3


def test_an_exported_model_still_changes_its_mode(exported, blobs):
    x, _ = blobs
    model = build()
    expected = model.predict(x, verbose=0)
    run = exported(model, "tf_saved_model")
    set_predict_mode(model, "softmax")
    np.testing.assert_allclose(model.predict(x, verbose=0), model(x), atol=1e-6)
    assert np.abs(model(x) - expected).max() > 1e-3
    np.testing.assert_allclose(run(x), expected, atol=1e-6)  # What was written is unchanged.
    again = exported(model, "tf_saved_model")
    np.testing.assert_allclose(again(x), model(x), atol=1e-6)
