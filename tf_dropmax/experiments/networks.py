"""Networks without their heads: models from images or embeddings to features.

Every network takes the same arguments and returns a Keras model:

    shape: Shape of an example. For an image it is `(height, width, channels)`.
    seed: Int, from which all random numbers come.
    l2: Non-negative float, the weight decay: `l2 / 2` times the squared norm of the weights is
        added to the loss. Defaults to 0.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import layers

Shape = tuple[int, ...]
Start = Callable[[int], keras.initializers.Initializer]


def identity(shape: Shape, seed: int, l2: float = 0.0) -> keras.Model:
    """No network: the features are the numbers of an example."""
    return keras.Sequential([keras.Input(shape), layers.Flatten()], name="features")


def mlp(
    shape: Shape,
    seed: int,
    l2: float = 0.0,
    width: int = 128,
    start: Start = keras.initializers.HeNormal,
) -> keras.Model:
    """One hidden layer.

    Args:
        shape, seed, l2: See the module.
        width: Positive int, number of features. Defaults to 128.
        start: Function from a seed to the initializer of the kernel. Defaults to He's.
    """
    dense = _dense(width, start(seed), l2)
    return keras.Sequential([keras.Input(shape), layers.Flatten(), dense], name="features")


def lenet(shape: Shape, seed: int, l2: float = 0.0, dropout: float = 0.0) -> keras.Model:
    """LeNet as in the authors' released code, with 500 features.

    It has 5 x 5 convolutions of 20 and 50 channels, each with pooling, and a layer of 500 units.
    The initial weights are Glorot's, as in the released code.

    Args:
        shape, seed, l2: See the module.
        dropout: Float in [0, 1), rate of a dropout of the features. Defaults to 0.0.
    """
    start = keras.initializers.GlorotUniform
    stack = [
        keras.Input(shape),
        _convolution(20, start(seed), l2),
        layers.MaxPooling2D(),
        _convolution(50, start(seed + 1), l2),
        layers.MaxPooling2D(),
        layers.Flatten(),
        _dense(500, start(seed + 2), l2),
        layers.Dropout(dropout, seed=seed),
    ]
    return keras.Sequential(stack, name="features")


def cnn(shape: Shape, seed: int, l2: float = 0.0) -> keras.Model:
    """A small network as in many tutorials, with 64 features.

    It has 3 x 3 convolutions of 32 and 64 channels, each with batch normalization and pooling, a
    layer of 64 units, and a dropout of 0.5.
    """
    start = keras.initializers.GlorotUniform
    stack = [keras.Input(shape)]
    for number, channels in enumerate((32, 64)):
        weights = _weights(start(seed + number), l2)
        stack.append(layers.Conv2D(channels, 3, activation="relu", **weights))
        stack += [layers.BatchNormalization(), layers.MaxPooling2D()]
    stack += [layers.Flatten(), _dense(64, start(seed + 2), l2), layers.Dropout(0.5, seed=seed)]
    return keras.Sequential(stack, name="features")


def tutorial_cnn(shape: Shape, seed: int, l2: float = 0.0) -> keras.Model:
    """The network of TensorFlow's tutorial "Deep MNIST for Experts", with 1,024 features.

    The paper uses it. It has convolutions of 32 and 64 channels. The tutorial also has the initial
    weights (standard deviation 0.1), the initial biases (0.1) and the dropout of 0.5 before the
    head.
    """

    def start(seed):
        return keras.initializers.TruncatedNormal(stddev=0.1, seed=seed)

    options = {"l2": l2, "bias_initializer": keras.initializers.Constant(0.1)}
    stack = [
        keras.Input(shape),
        _convolution(32, start(seed), padding="same", **options),
        layers.MaxPooling2D(),
        _convolution(64, start(seed + 1), padding="same", **options),
        layers.MaxPooling2D(),
        layers.Flatten(),
        _dense(1024, start(seed + 2), **options),
        layers.Dropout(0.5, seed=seed),
    ]
    return keras.Sequential(stack, name="features")


def resnet34(shape: Shape, seed: int, l2: float = 0.0) -> keras.Model:
    """The 34-layer residual network for 32 x 32 images, with 512 features.

    It has a 3 x 3 convolution, then 3, 4, 6 and 3 blocks of 64 to 512 channels. The network for
    ImageNet also has a stride and a pooling in its first layers, which would leave little of an
    image of this size.
    """
    return _residual(shape, seed, l2, [(64, 3), (128, 4), (256, 6), (512, 3)])


def resnet14(shape: Shape, seed: int, l2: float = 0.0) -> keras.Model:
    """A residual network of 14 layers for 32 x 32 images, with 64 features.

    It is the network of He et al. (2016) for CIFAR with two blocks of 16, 32 and 64 channels.
    """
    return _residual(shape, seed, l2, [(16, 2), (32, 2), (64, 2)])


def _residual(shape, seed, l2, stages):
    seeds = iter(range(seed, seed + 100))

    def convolution(x, channels, size, stride=1):
        initializer = keras.initializers.HeNormal(next(seeds))
        weights = {"kernel_initializer": initializer, "kernel_regularizer": decay(l2)}
        options = {"padding": "same", "use_bias": False}
        x = layers.Conv2D(channels, size, stride, **options, **weights)(x)
        return layers.BatchNormalization()(x)

    inputs = keras.Input(shape)
    x = layers.ReLU()(convolution(inputs, stages[0][0], 3))
    for stage, (channels, blocks) in enumerate(stages):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            same_shape = x.shape[-1] == channels and stride == 1
            shortcut = x if same_shape else convolution(x, channels, 1, stride)
            residual = layers.ReLU()(convolution(x, channels, 3, stride))
            x = layers.ReLU()(layers.Add()([shortcut, convolution(residual, channels, 3)]))
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x), name="features")


def decay(l2: float) -> keras.regularizers.Regularizer | None:
    """The regularizer that adds `l2 / 2` times the squared norm, or `None` if `l2` is 0."""
    return keras.regularizers.L2(l2 / 2) if l2 else None


def _dense(units, initializer, l2, **options):
    return layers.Dense(units, "relu", **_weights(initializer, l2), **options)


def _convolution(channels, initializer, l2, **options):
    return layers.Conv2D(channels, 5, activation="relu", **_weights(initializer, l2), **options)


def _weights(initializer: Any, l2: float) -> dict[str, Any]:
    return {
        "kernel_initializer": initializer,
        "kernel_regularizer": decay(l2),
        "bias_regularizer": decay(l2),
    }
