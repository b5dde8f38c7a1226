"""Saving, loading, copying."""

import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

import tf_dropmax
from tf_dropmax import DropMaxHead, DropMaxLoss

HEADS = [
    {},
    {"retain_probability": 0.4},
    {"posterior": "label", "auxiliary_weight": 0.2},
    {"stochastic": False, "predict_mode": "exact"},
    {"temperature": 0.5, "entropy_weight": 0.1, "seed": 5},
    {"use_bias": False, "predict_mode": "softmax"},
    {
        "kernel_regularizer": "l2",
        "retain": {"kernel_initializer": "glorot_uniform", "bias_constraint": "non_neg"},
    },
]


def trained(x, y, **kwargs):
    hidden = keras.layers.Dense(8, "relu")
    model = keras.Sequential([keras.Input((6,)), hidden, DropMaxHead(4, **kwargs)])
    model.compile("adam", DropMaxLoss(label_smoothing=0.1), metrics=["accuracy"])
    model.fit(x, y, verbose=0)
    return model


@pytest.mark.parametrize("kwargs", HEADS, ids=str)
def test_keras_file_weights_file_and_clone(blobs, tmp_path, kwargs):
    x, y = blobs
    model = trained(x, y, **kwargs)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    assert not np.allclose(clone(x), model(x))
    clone.load_weights(tmp_path / "model.weights.h5")
    again = keras.Sequential.from_config(model.get_config())
    again.set_weights(model.get_weights())
    for each in (loaded, clone, again):
        np.testing.assert_allclose(each(x), model(x), atol=1e-6)
        assert each.layers[-1].get_config() == model.layers[-1].get_config()
    config = loaded.layers[-1].get_config()
    for name, value in kwargs.items():
        if isinstance(value, (int, float)):
            assert config[name] == value
    loaded.fit(x, y, verbose=0)


def test_loads_in_a_new_process_with_only_the_import(blobs, tmp_path):
    x, y = blobs
    model = trained(x, y)
    tf_dropmax.set_predict_mode(model, "exact", samples=12)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=x, y=y, log_p=model(x), loss=model.evaluate(x, y, verbose=0))
    code = """
        import sys
        import keras, numpy as np
        import tf_dropmax
        model = keras.saving.load_model(sys.argv[1] + "/model.keras", safe_mode=True)
        data = np.load(sys.argv[1] + "/data.npz")
        np.testing.assert_allclose(model(data["x"]), data["log_p"], atol=1e-6)
        loss = model.evaluate(data["x"], data["y"], verbose=0)
        np.testing.assert_allclose(loss, data["loss"], rtol=1e-6)
        head = model.layers[-1]
        assert (head.predict_mode, head.predict_samples) == ("exact", 12)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)


def test_weights_of_another_shape_are_refused(blobs, tmp_path):
    trained(*blobs).save_weights(tmp_path / "model.weights.h5")
    other = trained(*blobs, retain_probability=0.5)
    with pytest.raises(ValueError, match="could not be loaded"):
        other.load_weights(tmp_path / "model.weights.h5")
