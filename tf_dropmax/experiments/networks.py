"""Networks without their heads: from images to features. Every random number comes from the given seed."""

import keras
from keras import layers


def mlp(shape, seed, width=128):
    """One hidden layer on the pixels.

    Args:
        shape: Shape of an image, `(height, width, channels)`.
        seed: Int.
        width: Positive int, number of features. Defaults to 128.

    Returns:
        A `keras.Sequential` from `(batch, *shape)` to `(batch, width)`.
    """
    initializer = keras.initializers.HeNormal(seed)
    hidden = layers.Dense(width, "relu", kernel_initializer=initializer)
    return keras.Sequential([keras.Input(shape), layers.Flatten(), hidden], name="features")
