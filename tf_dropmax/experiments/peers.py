"""Other ways to a better head, which the head is compared with: losses and layers on plain logits."""

import keras
import numpy as np
import tensorflow as tf
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from tf_dropmax.experiments.measures import negative_log_likelihood
from tf_dropmax.seeds import next_seed


def smoothed_cross_entropy(amount):
    """Cross entropy with label smoothing (Szegedy et al. 2016): the label has `1 - amount`, all classes share the rest."""
    smoothed = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=amount)
    return lambda labels, logits: smoothed(_one_hot(labels, logits), logits)


def focal_loss(gamma):
    """The focal loss (Lin et al. 2017), `-(1 - p)^gamma log p` of the label's probability p."""

    def loss(labels, logits):
        log_p = tf.reduce_sum(_one_hot(labels, logits) * tf.nn.log_softmax(logits), axis=-1)
        return -((1 - tf.exp(log_p)) ** gamma) * log_p

    return loss


def _one_hot(labels, logits):
    return tf.one_hot(tf.reshape(tf.cast(labels, tf.int32), [-1]), logits.shape[-1], dtype=logits.dtype)


class Cooled(keras.layers.Layer):
    """Divides logits by a temperature, at inference only: temperature scaling (Guo et al. 2017)."""

    def __init__(self, temperature, **kwargs):
        super().__init__(**kwargs)
        self.temperature = temperature

    def call(self, logits, training=False):
        return logits if training else logits / self.temperature


def best_temperature(log_probabilities, labels):
    """The temperature with the smallest negative log-likelihood, between 1/20 and 20.

    Args:
        log_probabilities: Array `(N, T)`.
        labels: Array `(N,)`.

    Returns:
        Float.
    """

    def loss(log_temperature):
        return negative_log_likelihood(log_softmax(log_probabilities / np.exp(log_temperature), axis=-1), labels)

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


class HeteroscedasticHead(keras.layers.Layer):
    """Logits with noise whose size the network learns for every example (Collier et al. 2021).

    `u = mu + V e + sigma e'`, with `mu`, the `(T, factors)` matrix `V` and `sigma` linear in the features (`sigma` after a
    softplus) and standard normal `e`, `e'`; log-probabilities are of the mean of `softmax(u / temperature)` over samples.

    Args:
        units: Positive int, T.
        temperature: Positive float.
        factors: Positive int, rank of the covariance besides its diagonal. Defaults to 6.
        samples: Positive int. Defaults to 30.
        seed: `None` or int. Defaults to `None`.
        **kwargs: As for `keras.layers.Dense`, of which all the branches are made.
    """

    def __init__(self, units, temperature, factors=6, samples=30, seed=None, **kwargs):
        super().__init__()
        self.units, self.temperature, self.factors, self.samples = units, temperature, factors, samples
        widths = (units, units * factors, units)
        initializers = [keras.initializers.GlorotUniform(None if seed is None else seed + part) for part in range(3)]
        self.branches = [
            keras.layers.Dense(width, kernel_initializer=initializer, **kwargs)
            for width, initializer in zip(widths, initializers, strict=True)
        ]
        self.seeds = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        for branch in self.branches:
            branch.build(input_shape)

    def call(self, features):
        mean, factors, scale = (branch(features) for branch in self.branches)
        rows = tf.shape(mean)[0]
        factors = tf.reshape(factors, [rows, self.units, self.factors])
        noise = tf.random.stateless_normal([self.samples, rows, self.units + self.factors], next_seed(self.seeds), alg="philox")
        logits = mean + tf.nn.softplus(scale) * noise[..., : self.units]
        logits += tf.einsum("btr,sbr->sbt", factors, noise[..., self.units :])
        log_p = tf.nn.log_softmax(logits / self.temperature)
        return tf.reduce_logsumexp(log_p, axis=0) - tf.math.log(float(self.samples))
