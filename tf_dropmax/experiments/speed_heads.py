"""The heads whose training steps are timed: DropMax, its variants, and baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

from tf_dropmax import DropMaxHead, DropMaxLoss

BATCH, FEATURES = 256, 512

Step = Callable[[], tuple[tf.Tensor, list[tf.Tensor]]]


class NaiveHead(keras.layers.Layer):
    """DropMax in a first version: masks from `RelaxedBernoulli.sample` and automatic gradients.

    Args:
        units: Positive int, the number of classes T.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(self, units: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.logits, self.retain = (
            keras.layers.Dense(units, dtype=self.dtype_policy) for _ in range(2)
        )

    def build(self, input_shape: Any) -> None:
        self.logits.build(input_shape)
        self.retain.build(input_shape)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        logits, retain_logits = (
            tf.cast(branch(inputs), tf.float32) for branch in (self.logits, self.retain)
        )
        masks = tfp.distributions.RelaxedBernoulli(0.1, logits=retain_logits).sample()
        masks = tf.clip_by_value(masks, 1e-7, 1 - 1e-7)
        log_sum = tf.reduce_logsumexp(logits + tf.math.log(masks), axis=-1, keepdims=True)
        terms = [log_sum + tf.zeros_like(logits), logits + tf.math.log(1 - masks)]
        log_target = tf.reduce_logsumexp(tf.stack(terms), axis=0)
        log_rho, rho = tf.math.log_sigmoid(retain_logits), tf.sigmoid(retain_logits)
        entropy = -rho * log_rho - (1 - rho) * tf.math.log_sigmoid(-retain_logits)
        self.add_loss(-tf.reduce_mean(tf.reduce_sum(entropy, axis=-1)))
        return log_rho + logits - log_target - entropy


def cross_entropy() -> keras.losses.Loss:
    """The loss of plain logits."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def heads_and_losses(
    classes: int, policy: str
) -> dict[str, tuple[keras.layers.Layer, keras.losses.Loss]]:
    """Heads with their losses, by name. The first is the baseline.

    Args:
        classes: Positive int, T.
        policy: Dtype policy.
    """
    dense = partial(keras.layers.Dense, dtype=policy)
    head = partial(DropMaxHead, classes, dtype=policy)
    dropout = keras.Sequential([keras.layers.Dropout(0.5, dtype=policy), dense(classes)])
    return {
        "Dense(2T)": (dense(2 * classes), cross_entropy()),
        "Dense(T)": (dense(classes), cross_entropy()),
        "DropMax": (head(), DropMaxLoss()),
        "Dense(3T)": (dense(3 * classes), cross_entropy()),
        "label": (head(posterior="label"), DropMaxLoss()),
        "attention": (head(stochastic=False), DropMaxLoss()),
        "random": (head(retain_probability=0.4), DropMaxLoss()),
        "naive": (NaiveHead(classes, dtype=policy), DropMaxLoss()),
        "MC dropout": (dropout, cross_entropy()),
    }


def training_steps(
    classes: int,
    policy: str = "float32",
    compiled: bool = False,
    names: Sequence[str] | None = None,
    batch: int = BATCH,
) -> dict[str, Step]:
    """Functions that run the forward and backward pass of a head on the same random features.

    Args:
        classes: Positive int, T.
        policy: Dtype policy. Defaults to `"float32"`.
        compiled: Bool, whether XLA compiles them. Defaults to `False`.
        names: Sequence of names of `heads_and_losses`. `None` takes all. Defaults to `None`.
        batch: Positive int, number of examples. Defaults to `BATCH`.

    Returns:
        Dictionary of functions without arguments. They return the loss and its gradients with
        respect to the features and the weights.
    """
    draw = np.random.default_rng(0)
    x = tf.Variable(draw.normal(size=(batch, FEATURES)).astype("float32"))
    y = tf.Variable(draw.integers(classes, size=batch))
    contenders = heads_and_losses(classes, policy)
    names = names or list(contenders)
    for name in names:
        contenders[name][0].build(x.shape)
    return {name: training_step(*contenders[name], x, y, compiled) for name in names}


def training_step(
    head: keras.layers.Layer,
    loss: keras.losses.Loss,
    x: tf.Variable,
    y: tf.Variable,
    compiled: bool = False,
) -> Step:
    """One function of `training_steps`, for a built head and its loss."""

    @tf.function(jit_compile=compiled)
    def step():
        features = tf.identity(x)
        with tf.GradientTape() as tape:
            tape.watch(features)
            value = loss(y, head(features, training=True)) + sum(head.losses)
        return value, tape.gradient(value, [features, *head.trainable_variables])

    return step
