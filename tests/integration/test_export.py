"""`model.export`, and the runtimes that load what it writes."""

from pathlib import Path

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
import tf2onnx
from ai_edge_litert.interpreter import Interpreter
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


# Before 3.13, Keras exports nothing to LiteRT, and `tf2onnx.convert.from_keras` takes none of its
# models.
NEW_KERAS = Version(keras.__version__) >= Version("3.13")
FORMATS = {
    "tf_saved_model": ("", saved_model),
    "litert": (".tflite", litert),
    "onnx": (".onnx", onnx),
}


def build(shape=(6,), **kwargs):
    """Retain probabilities of all sizes, as if it was trained."""
    initializers = {
        "kernel_initializer": "random_normal",
        "retain_kernel_initializer": keras.initializers.RandomNormal(0, 2),
    }
    return keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Dense(8, "relu"),
            DropMaxHead(4, seed=1, **{**initializers, **kwargs}),
        ]
    )


def convert_to_litert(model, path):
    Path(path).write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())


def write(model, path, kind):
    if kind == "litert" and not NEW_KERAS:
        convert_to_litert(model, path)
    else:
        model.export(path, format=kind, verbose=False)


@pytest.fixture
def exported(tmp_path):
    """Exports a model, and gives what the format's own runtime makes of the file."""

    def export(model, kind):
        suffix, load = FORMATS[kind]
        path = str(tmp_path / f"model{suffix}")
        write(model, path, kind)
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


def convert_to_onnx(model, path):
    if NEW_KERAS:
        model.output_names = ["output"]  # tf2onnx needs the name for every model of Keras 3.
        tf2onnx.convert.from_keras(model, output_path=str(path))
    else:
        signature = [tf.TensorSpec((None, 6), tf.float32, name="x")]
        tf2onnx.convert.from_function(tf.function(model), signature, output_path=str(path))


WRITERS = {
    "export to onnx": lambda model, path: write(model, path, "onnx"),
    "export to litert": lambda model, path: write(model, path, "litert"),
    "tf2onnx": convert_to_onnx,
    "TFLiteConverter": convert_to_litert,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_cannot_draw_masks_is_an_error_and_no_file(tmp_path, writer):
    model = build(predict_mode="sampled")
    model(np.ones((1, 6), "float32"))  # Keras exports no model to ONNX that was never called.
    path = tmp_path / f"model.{'onnx' if 'onnx' in writer else 'tflite'}"
    with pytest.raises(Exception, match=r"qint32|func\.return") as error:
        WRITERS[writer](model, path)
    assert error.typename == ("KeyError" if "onnx" in writer else "ConverterError")
    assert not list(tmp_path.iterdir())


def test_other_ways_to_export_give_the_mode_too(tmp_path, blobs):
    x, _ = blobs
    model = build(predict_mode="exact")
    convert_to_onnx(model, tmp_path / "model.onnx")
    agree(model, onnx(str(tmp_path / "model.onnx")), x)
    convert_to_litert(model, tmp_path / "model.tflite")
    agree(model, litert(str(tmp_path / "model.tflite")), x)
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
    assert np.abs(model.predict(x, verbose=0) - expected).max() > 1e-3
    assert np.abs(model(x) - expected).max() > 1e-3
    np.testing.assert_allclose(run(x), expected, atol=1e-6)  # What was written is unchanged.
    again = exported(model, "tf_saved_model")
    np.testing.assert_allclose(again(x), model(x), atol=1e-6)
