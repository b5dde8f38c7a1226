"""Networks without their heads: from images to features. Every random number comes from the given seed."""

import keras
from keras import layers


def mlp(shape, seed, l2=0.0, width=128):
    """One hidden layer on the pixels.

    Args:
        shape: Shape of an image, `(height, width, channels)`.
        seed: Int.
        l2: Non-negative float, weight decay: `l2 / 2` times the squared norm of all weights is added to the loss. Defaults
            to 0.0.
        width: Positive int, number of features. Defaults to 128.

    Returns:
        A `keras.Sequential` from `(batch, *shape)` to `(batch, width)`.
    """
    dense = _dense(width, keras.initializers.HeNormal(seed), l2)
    return keras.Sequential([keras.Input(shape), layers.Flatten(), dense], name="features")


def lenet(shape, seed, l2=0.0, start=keras.initializers.GlorotUniform):
    """LeNet as in the authors' released code: convolutions 5 x 5 of 20 and 50 channels, each with pooling, then 500 units.

    Args and result as for `mlp`; 500 features. `start` is the class of the initializers of the kernels, Glorot's as there;
    He's are more than four times as large in the first layer, which makes a difference.
    """
    stack = [
        keras.Input(shape),
        _convolution(20, start(seed), l2),
        layers.MaxPooling2D(),
        _convolution(50, start(seed + 1), l2),
        layers.MaxPooling2D(),
        layers.Flatten(),
        _dense(500, start(seed + 2), l2),
    ]
    return keras.Sequential(stack, name="features")


def tutorial_cnn(shape, seed, l2=0.0):
    """The network of TensorFlow's tutorial "Deep MNIST for Experts", which the paper uses: 32 and 64 channels, 1,024 units.

    Args and result as for `mlp`; 1,024 features. The initial weights (standard deviation 0.1) and biases (0.1) are the
    tutorial's, and so is the dropout before the head, 0.5.
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


def alexnet(shape, seed, l2=0.0):
    """AlexNet in one tower, without its response normalisation, for photographs of 227 x 227 pixels from 0 to 255.

    Args and result as for `mlp`; 4,096 features.
    """
    stack = [keras.Input(shape), layers.Rescaling(1 / 255)]
    for number, (channels, size, stride, pool) in enumerate(
        [(96, 11, 4, True), (256, 5, 1, True), (384, 3, 1, False), (384, 3, 1, False), (256, 3, 1, True)]
    ):
        padding = "valid" if number == 0 else "same"
        weights = _weights(keras.initializers.HeNormal(seed + number), l2)
        stack.append(layers.Conv2D(channels, size, stride, padding=padding, activation="relu", **weights))
        if pool:
            stack.append(layers.MaxPooling2D(3, 2))
    stack.append(layers.Flatten())
    for number in (5, 6):
        stack += [_dense(4096, keras.initializers.HeNormal(seed + number), l2), layers.Dropout(0.5, seed=seed + number)]
    return keras.Sequential(stack, name="features")


def resnet34(shape, seed, l2=0.0):
    """The 34-layer residual network for 32 x 32 images: a 3 x 3 convolution, then 3, 4, 6, 3 blocks of 64 to 512 channels.

    Args and result as for `mlp`; 512 features. Without the stride and the pooling of the first layers of the network for
    ImageNet, which would leave little of so small an image.
    """
    seeds = iter(range(seed, seed + 100))

    def convolution(x, channels, size, stride=1):
        weights = {"kernel_initializer": keras.initializers.HeNormal(next(seeds)), "kernel_regularizer": decay(l2)}
        x = layers.Conv2D(channels, size, stride, padding="same", use_bias=False, **weights)(x)
        return layers.BatchNormalization()(x)

    inputs = keras.Input(shape)
    x = layers.ReLU()(convolution(inputs, 64, 3))
    for stage, blocks in enumerate((3, 4, 6, 3)):
        channels = 64 * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            shortcut = x if x.shape[-1] == channels and stride == 1 else convolution(x, channels, 1, stride)
            residual = convolution(layers.ReLU()(convolution(x, channels, 3, stride)), channels, 3)
            x = layers.ReLU()(layers.Add()([shortcut, residual]))
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x), name="features")


def decay(l2):
    """The regularizer that adds `l2 / 2` times the squared norm, or `None`."""
    return keras.regularizers.L2(l2 / 2) if l2 else None


def _dense(units, initializer, l2, **options):
    return layers.Dense(units, "relu", **_weights(initializer, l2), **options)


def _convolution(channels, initializer, l2, **options):
    return layers.Conv2D(channels, 5, activation="relu", **_weights(initializer, l2), **options)


def _weights(initializer, l2):
    return {"kernel_initializer": initializer, "kernel_regularizer": decay(l2), "bias_regularizer": decay(l2)}
