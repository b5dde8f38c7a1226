"""How uncertain a prediction is, and how much of the uncertainty comes from the masks."""

from typing import Any, NamedTuple

import tensorflow as tf

from tf_dropmax.functional.numerics import broadcast, to_float
from tf_dropmax.functional.prediction import means_over_masks
from tf_dropmax.functional.quadrature import exact_log_probabilities


class Uncertainty(NamedTuple):
    """The result of `uncertainty`.

    Attributes:
        entropy: Shape `(...)`, in nats. Entropy of the prediction (16): the total uncertainty.
        mutual_information: Shape `(...)`, in nats. The part of the entropy that the random masks
            cause. The rest is the mean entropy of the softmax under one mask.
        spread: Shape `(..., T)`. Standard deviation of the probability of a class over the masks.

    Example:

    >>> F = tf_dropmax.functional
    >>> result = F.uncertainty([0.0, 0.0], [100.0, 100.0])  # every mask keeps both classes
    >>> [round(float(value), 4) for value in (result.entropy, result.mutual_information)]
    [0.6931, 0.0]
    """

    entropy: tf.Tensor
    mutual_information: tf.Tensor
    spread: tf.Tensor


def uncertainty(
    logits: Any, retain_logits: Any, samples: int | tf.Tensor = 100, seed: Any = (0, 0)
) -> Uncertainty:
    """Uncertainty of the prediction over hard Bernoulli masks `z`, with `p(z)` the softmax (5).

    Let `m = E[p(z)]`, eq. (16), from `exact_log_probabilities`. The entropy is `H(m)`. The mutual
    information is the mean of `KL(p(z) || m)` over drawn masks, which is unbiased and never
    negative. The spread is the root of the mean of `(p_k(z) - m_k)^2`. Only one mask is in memory
    at a time. The function has no gradient.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`.
        samples: Positive int or scalar int tensor, number of masks. Defaults to 100.
        seed: Integer tensor or pair of integers, shape `(2,)`. Defaults to `(0, 0)`.

    Returns:
        An `Uncertainty` of three tensors. The entropy is as accurate as
        `exact_log_probabilities`. The errors of the other two fall as `1 / sqrt(samples)`, so the
        mutual information may be slightly larger than the entropy.

    Example:

    >>> F = tf_dropmax.functional
    >>> result = F.uncertainty([9.0, 0.0], [0.0, 100.0])  # class 0 is kept by half of the masks
    >>> result.spread.numpy().round(1)
    array([0.5, 0.5], dtype=float32)
    """
    arguments = broadcast(to_float(logits), to_float(retain_logits))
    logits, retain_logits = (tf.stop_gradient(x) for x in arguments)
    log_mean = exact_log_probabilities(logits, retain_logits)
    mean = tf.exp(log_mean)

    def terms(p, kept):
        return [tf.math.xlogy(p, p) - p * log_mean, tf.square(p - mean)]

    divergence, square = means_over_masks(terms, 2, logits, retain_logits, samples, seed)
    return Uncertainty(
        entropy=-tf.reduce_sum(mean * log_mean, axis=-1),
        mutual_information=tf.maximum(tf.reduce_sum(divergence, axis=-1), 0),
        spread=tf.sqrt(square),
    )
