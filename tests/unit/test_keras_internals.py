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
