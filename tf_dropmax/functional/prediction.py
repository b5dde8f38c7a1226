"""Test-time predictions, one function per mode; `exact_log_probabilities` is in `quadrature`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tf_dropmax.functional.masks import uniform_draws
from tf_dropmax.functional.numerics import (
    LOG_OF_ZERO,
    broadcast,
    log_probabilities,
    log_sigmoid,
    relative_to_maximum,
    tiny,
    to_float,
)
from tf_dropmax.functional.quadrature import exact_log_probabilities

# Large, so that the draws of one call and those of a call with a neighbouring seed are different.
_SAMPLE_STRIDE = 1103515245


def softmax_log_probabilities(logits: Any, temperature: float | tf.Tensor = 1.0) -> tf.Tensor:
    """Log-probabilities of the plain softmax, eq. (2), without masks.

    Args:
        logits: Float tensor, shape `(..., T)`.
        temperature: Positive float or scalar tensor, at least 0.01 and at most 100. The
            log-probabilities are divided by it and normalised again. Defaults to 1.0.

    Returns:
        Log-probabilities, shape `(..., T)`.

    Example:

    >>> log_p = tf_dropmax.functional.softmax_log_probabilities([0.0, 0.0])
    >>> tf.exp(log_p).numpy().round(4).tolist()
    [0.5, 0.5]
    """
    return log_probabilities(to_float(logits), temperature)


def expected_log_probabilities(
    logits: Any, retain_logits: Any, temperature: float | tf.Tensor = 1.0
) -> tf.Tensor:
    """Log-probabilities with every mask at its mean, eq. (18).

    `p_k = rho_k exp(o_k) / sum_t rho_t exp(o_t)`.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`.
        temperature: As for `softmax_log_probabilities`. Defaults to 1.0.

    Returns:
        Log-probabilities, shape `(..., T)`.

    Example:

    >>> F = tf_dropmax.functional
    >>> log_p = F.expected_log_probabilities([0.0, 0.0], [100.0, 0.0])  # rho is 1 and 1/2
    >>> tf.exp(log_p).numpy().round(4)
    array([0.6667, 0.3333], dtype=float32)
    """
    relative = relative_to_maximum(to_float(logits))
    return log_probabilities(relative + log_sigmoid(to_float(retain_logits)), temperature)


def sampled_log_probabilities(
    logits: Any,
    retain_logits: Any,
    samples: int | tf.Tensor = 30,
    seed: Any = (0, 0),
    temperature: float | tf.Tensor = 1.0,
) -> tf.Tensor:
    """Log of the mean of the softmax (5) over drawn masks, eq. (17).

    The masks are hard Bernoulli draws. Memory is O(B T) for any number of samples, because only one
    mask is in memory at a time. If no draw keeps a class, its estimate is 0. The function then uses
    the log of the smallest normal number (-87.3 in float32), which is finite. The gradient with
    respect to `logits` goes through the same draws. The gradient with respect to `retain_logits` is
    that of `exact_log_probabilities`, because the draws have none.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`.
        samples: Positive int or scalar int tensor, the paper's S. Defaults to 30.
        seed: Integer tensor or pair of integers, shape `(2,)`. Defaults to `(0, 0)`.
        temperature: As for `softmax_log_probabilities`. Defaults to 1.0.

    Returns:
        Log-probabilities, shape `(..., T)`.

    Example:

    >>> F = tf_dropmax.functional
    >>> log_p = F.sampled_log_probabilities([1.0, 0.0], [9.0, -9.0], samples=100, seed=(1, 2))
    >>> bool(log_p[0] > log_p[1])
    True
    """
    logits, retain_logits = broadcast(to_float(logits), to_float(retain_logits))

    # Not `traced_once`: the converters remove the functions of loops; see `kernels`.
    @tf.custom_gradient
    def log_mean(logits, retain_logits):
        (mean,) = means_over_masks(lambda p, kept: [p], 1, logits, retain_logits, samples, seed)
        mean += tiny(logits)

        def gradient(upstream):
            upstream.set_shape(logits.shape)  # A kernel forgets the number of rows.

            def terms(p, kept):
                pull = upstream * (p / mean)  # The ratio is at most `samples`.
                total = tf.reduce_sum(pull, axis=-1, keepdims=True)
                return [tf.where(kept, pull - p * total, 0)]

            (by_logits,) = means_over_masks(terms, 1, logits, retain_logits, samples, seed)
            with tf.GradientTape() as tape:
                tape.watch(retain_logits)
                expectation = exact_log_probabilities(logits, retain_logits)
            return by_logits, tape.gradient(expectation, retain_logits, upstream)

        return tf.math.log(mean), gradient

    # A row with a NaN keeps no class. Without this line its prediction would be uniform.
    total = tf.stop_gradient(tf.reduce_sum(logits + retain_logits, axis=-1, keepdims=True))
    log_p = tf.where(tf.math.is_nan(total), total, log_mean(logits, retain_logits))
    return log_probabilities(log_p, temperature)


def means_over_masks(
    terms: Callable[[tf.Tensor, tf.Tensor], list[tf.Tensor]],
    count: int,
    logits: tf.Tensor,
    retain_logits: tf.Tensor,
    samples: int | tf.Tensor,
    seed: Any,
) -> list[tf.Tensor]:
    """Means over drawn masks of the tensors that `terms` computes.

    Args:
        terms: Function from the softmax `p` under a mask and the bool mask `kept`, both of the
            shape of `logits`, to a list of `count` tensors of that shape.
        count: Positive int.
        logits, retain_logits, samples, seed: As for `sampled_log_probabilities`.

    Returns:
        List of `count` tensors.
    """
    retain, seed = tf.sigmoid(retain_logits), tf.cast(seed, tf.int64)
    samples = tf.cast(samples, tf.int64)

    def add(index, *totals):
        draw_seed = tf.stack([seed[0] + index * _SAMPLE_STRIDE, seed[1]])
        kept = uniform_draws(tf.shape(logits), draw_seed, logits.dtype) < retain
        # If no class is kept, all entries are equal and the softmax is uniform, as it should be.
        p = tf.nn.softmax(tf.where(kept, logits, LOG_OF_ZERO))
        added = [total + term for total, term in zip(totals, terms(p, kept), strict=True)]
        return index + 1, *added

    def more(index, *_):
        return index < samples

    start = (tf.zeros((), tf.int64), *[tf.zeros_like(logits)] * count)
    totals = tf.while_loop(more, add, start, parallel_iterations=1)[1:]
    return [total / tf.cast(samples, logits.dtype) for total in totals]
