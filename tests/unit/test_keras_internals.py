import importlib
import sys

import keras
import pytest
import tensorflow as tf

from tf_dropmax import DropMaxHead, keras_internals


def test_layers_at_any_depth():
    head = DropMaxHead(3)
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), head])

    class Around(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.parts = {"model": inner}

    around = Around()
    found = keras_internals.layers_in(around)
    assert found[0] is around
    assert {id(layer) for layer in (inner, head)} <= {id(layer) for layer in found}


def test_the_layer_that_is_traced():
    seen = []

    class Inner(keras.layers.Layer):
        def call(self, x):
            seen.append(keras_internals.traced_layer())
            return x

    model = keras.Sequential([keras.Input((4,)), Inner()])
    seen.clear()
    model(tf.ones((2, 4)))
    tf.function(model)(tf.ones((2, 4)))
    assert seen == [None, model]
    assert keras_internals.traced_layer() is None


def test_a_keras_that_does_not_tell_which_layer_is_traced_is_refused(monkeypatch):
    """Otherwise a change of the mode would be lost without an error."""
    model = keras.Sequential([keras.Input((4,)), DropMaxHead(3)])
    monkeypatch.setattr(keras_internals, "get_global_attribute", lambda name: None)
    model(tf.ones((2, 4)))  # Eager calls need it not.
    with pytest.raises(RuntimeError, match=f"does not support Keras {keras.__version__}: no call"):
        tf.function(model)(tf.ones((2, 4)))


def test_losses_and_metrics_of_keras_use_the_mask():
    """A mask that the package attaches is one that Keras reads, and the other way round."""
    loss = tf.constant([1.0, 5.0])
    keras_internals.set_mask(loss, tf.constant([True, False]))

    class Given(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return loss

    assert float(Given()(tf.zeros(2), tf.zeros(2))) == pytest.approx(1.0, rel=1e-6)
    masked = keras.layers.Masking()(tf.constant([[[1.0], [0.0]]]))
    assert keras_internals.get_mask(masked).numpy().tolist() == [[True, False]]
    assert keras_internals.get_mask(tf.ones(2)) is None


@pytest.mark.parametrize("missing", ["module", "method"])
def test_a_keras_without_them_is_refused(monkeypatch, missing):
    if missing == "module":
        monkeypatch.setitem(sys.modules, "keras.src.backend.common.global_state", None)
    else:
        owner = next(c for c in keras.layers.Layer.__mro__ if "_flatten_layers" in vars(c))
        monkeypatch.delattr(owner, "_flatten_layers")
    monkeypatch.delitem(sys.modules, "tf_dropmax.keras_internals")
    with pytest.raises(ImportError, match=f"does not support Keras {keras.__version__}: "):
        importlib.import_module("tf_dropmax.keras_internals")
