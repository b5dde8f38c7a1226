"""Saving, loading, copying, resuming."""

import json
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
    {
        "temperature": 0.5,
        "entropy_weight": 0.1,
        "use_bias": False,
        "predict_mode": "softmax",
        "seed": 5,
    },
    {
        "kernel_regularizer": "l2",
        "retain": {"kernel_initializer": "glorot_uniform", "bias_constraint": "non_neg"},
    },
]


@pytest.fixture
def trained(blobs):
    def train(**kwargs):
        x, y = blobs
        model = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(8, "relu"), DropMaxHead(4, **kwargs)]
        )
        model.compile(
            keras.optimizers.Adam(0.02), DropMaxLoss(label_smoothing=0.1), metrics=["accuracy"]
        )
        model.fit(x, y, verbose=0)
        return model, x, y

    return train


@pytest.mark.parametrize("kwargs", HEADS, ids=str)
def test_config_round_trip(kwargs):
    head = DropMaxHead(4, name="mine", dtype="mixed_bfloat16", **kwargs)
    config = head.get_config()
    again = DropMaxHead.from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config
    for name, value in {"units": 4, "name": "mine", "predict_samples": 30, **kwargs}.items():
        if isinstance(value, (int, float)):
            assert config[name] == value


@pytest.mark.parametrize("kwargs", HEADS, ids=str)
def test_keras_file_weights_file_and_clone(trained, tmp_path, kwargs):
    model, x, y = trained(**kwargs)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, atol=1e-6)
    assert loaded.evaluate(x, y, verbose=0) == pytest.approx(
        model.evaluate(x, y, verbose=0), rel=1e-6
    )
    loaded.fit(x, y, verbose=0)

    model.save_weights(tmp_path / "model.weights.h5")
    clone = keras.models.clone_model(model)
    assert not np.allclose(clone.predict(x, verbose=0), expected)
    clone.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(clone.predict(x, verbose=0), expected, atol=1e-6)
    again = keras.Sequential.from_config(model.get_config())
    again.set_weights(model.get_weights())
    np.testing.assert_allclose(again.predict(x, verbose=0), expected, atol=1e-6)


def test_loads_in_a_new_process_with_only_the_import(trained, tmp_path):
    model, x, _ = trained()
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "expected.npy", model.predict(x, verbose=0))
    code = """
        import sys
        import keras, numpy as np
        import tf_dropmax
        model = keras.saving.load_model(sys.argv[1] + "/model.keras", safe_mode=True)
        found = model.predict(np.load(sys.argv[1] + "/x.npy"), verbose=0)
        np.testing.assert_allclose(found, np.load(sys.argv[1] + "/expected.npy"), atol=1e-6)
        assert type(model.loss) is tf_dropmax.DropMaxLoss and model.loss.label_smoothing == 0.1
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=True, timeout=120
    )


def test_a_saved_model_keeps_the_mode_that_was_set(trained, tmp_path):
    model, x, _ = trained()
    tf_dropmax.set_predict_mode(model, "exact", samples=12)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert (loaded.layers[-1].predict_mode, loaded.layers[-1].predict_samples) == ("exact", 12)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)


def test_a_resumed_training_is_the_training_that_was_not_stopped(blobs, tmp_path):
    x, y = blobs

    def build():
        model = keras.Sequential([keras.Input((6,)), DropMaxHead(4, seed=1)])
        model.compile("adam", DropMaxLoss())
        return model

    settings = {"batch_size": 32, "epochs": 4, "shuffle": False, "verbose": 0}
    whole = build()
    whole.fit(x, y, **settings)

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build().fit(
            x, y, callbacks=[keras.callbacks.BackupAndRestore(tmp_path), Stop()], **settings
        )
    resumed = build()
    history = resumed.fit(x, y, callbacks=[keras.callbacks.BackupAndRestore(tmp_path)], **settings)
    assert history.epoch == [2, 3]
    for one, other in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_weights_of_another_shape_are_refused(trained, tmp_path):
    model, _, _ = trained()
    model.save_weights(tmp_path / "model.weights.h5")
    other, _, _ = trained(retain_probability=0.5)
    with pytest.raises(ValueError, match="could not be loaded"):
        other.load_weights(tmp_path / "model.weights.h5")
