"""Losses and layers of other methods, with which DropMax is compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

Loss = Callable[[Any, tf.Tensor], tf.Tensor]


def smoothed_cross_entropy(label_smoothing: float) -> Loss:
    """Cross entropy of logits with label smoothing (Szegedy et al. 2016).

    Args:
        label_smoothing: Float in [0, 1]. All classes share this part of the probability.

    Returns:
        Function of sparse labels, shape `(batch,)` or `(batch, 1)`, and logits `(batch, T)`.
    """
    options = {"from_logits": True, "label_smoothing": label_smoothing}
    smoothed = keras.losses.CategoricalCrossentropy(**options)
    return lambda labels, logits: smoothed(_one_hot(labels, logits), logits)


def focal_loss(gamma: float) -> Loss:
    """The focal loss (Lin et al. 2017), `-(1 - p)^gamma log p`, where p is that of the label.

    Args:
        gamma: Non-negative float.

    Returns:
        Function as for `smoothed_cross_entropy`.
    """

    def loss(labels, logits):
        log_p = tf.reduce_sum(_one_hot(labels, logits) * tf.nn.log_softmax(logits), axis=-1)
        return -((1 - tf.exp(log_p)) ** gamma) * log_p

    return loss


def _one_hot(labels, logits):
    labels = tf.reshape(tf.cast(labels, tf.int32), [-1])
    return tf.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


class HeteroscedasticHead(keras.layers.Layer):
    """Logits with noise whose size depends on the example (Collier et al. 2021).

    The noisy logits are `u = mu + V e + sigma e'` with standard normal `e` and `e'`. The mean
    `mu` and the `(T, factors)` matrix `V` are linear in the features. `sigma` is the softplus of
    a linear function. The layer returns the logarithm of the mean of `softmax(u / temperature)`
    over samples.

    Args:
        units: Positive int, the number of classes T.
        temperature: Positive float.
        factors: Positive int, rank of `V`. Defaults to 6.
        samples: Positive int. Defaults to 30.
        seed: Int. Defaults to 0.
        **kwargs: Arguments of `keras.layers.Dense`, for all three branches.
    """

    def __init__(
        self,
        units: int,
        temperature: float,
        factors: int = 6,
        samples: int = 30,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__()
        self.units, self.temperature = units, temperature
        self.factors, self.samples = factors, samples
        self.branches = [
            keras.layers.Dense(
                width, kernel_initializer=keras.initializers.GlorotUniform(seed + branch), **kwargs
            )
            for branch, width in enumerate((units, units * factors, units))
        ]
        self.seeds = keras.random.SeedGenerator(seed)

    def call(self, features: tf.Tensor) -> tf.Tensor:
        mean, factors, scale = (branch(features) for branch in self.branches)
        rows = tf.shape(mean)[0]
        factors = tf.reshape(factors, [rows, self.units, self.factors])
        shape = [self.samples, rows, self.units + self.factors]
        noise = keras.random.normal(shape, seed=self.seeds)
        logits = mean + tf.nn.softplus(scale) * noise[..., : self.units]
        logits += tf.einsum("btr,sbr->sbt", factors, noise[..., self.units :])
        log_p = tf.nn.log_softmax(logits / self.temperature)
        return tf.reduce_logsumexp(log_p, axis=0) - tf.math.log(float(self.samples))
