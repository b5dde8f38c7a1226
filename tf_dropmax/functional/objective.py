"""The training objective: one score per class, computed as if that class were the label.

The loss of an example is minus the score of its label, minus the weighted entropy of the masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tf_dropmax.functional.kernels import traced_once
from tf_dropmax.functional.numerics import LIMIT, broadcast, scalar, to_float

# Without XLA every operation is a pass over memory, so the kernels of this file have few of them.

# `dy * y * (1 - y)` in one operation. The order of its products does not overflow.
_times_sigmoid_slope = tf.raw_ops.SigmoidGrad
# The kept weights of a row sum to at least this, about exp(-80), relative to the largest weight.
_LEAST_KEPT = 2.0**-115
# Sums over classes of retain and auxiliary logits, times a weight, must stay finite.
_SUMMED_LIMIT = 1e28


def mask_entropy(retain_logits: Any) -> tf.Tensor:
    """Entropy of every mask, a term of eq. (14): `-rho log rho - (1 - rho) log(1 - rho)`.

    Args:
        retain_logits: Float tensor, shape `(..., T)`.

    Returns:
        Tensor of shape `(..., T)`, in nats, values in [0, log 2].

    Example:

    >>> tf_dropmax.functional.mask_entropy([0.0, 1000.0]).numpy().round(4)
    array([0.6931, 0.    ], dtype=float32)
    """
    return _mask_entropy(to_float(retain_logits))


@traced_once
def _mask_entropy(retain_logits):
    def gradient(upstream):
        slope = _times_sigmoid_slope(y=tf.sigmoid(-retain_logits), dy=retain_logits)
        return -upstream * slope

    return _Sides.of(retain_logits).entropy, gradient


class _Sides(NamedTuple):
    """A mask with the logit `x`, seen from its more probable and its less probable value."""

    magnitude: tf.Tensor  # |x|
    less: tf.Tensor  # probability of the less probable value, at most 1/2
    log_more: tf.Tensor  # log-probability of the more probable value
    entropy: tf.Tensor

    @classmethod
    def of(cls, x):
        magnitude = tf.abs(x)
        less = tf.sigmoid(-magnitude)
        log_more = tf.math.log1p(-less)
        return cls(magnitude, less, log_more, entropy=magnitude * less - log_more)


def target_log_likelihood(logits: Any, mask_logits: Any) -> tf.Tensor:
    """One log-likelihood (5) per class, computed as if it were the target and its mask were 1.

    With `w = exp(o)` and `S = sum_t z_t w_t` over all masks, the result is `o_k - log D_k`, where
    `D_k = S + (1 - z_k) w_k`. `D_k` is a sum of terms that are not negative. The cost is O(T)
    for all T classes. `S` counts as at least exp(-80) of the largest weight. In float32, the
    gradient with respect to a mask logit above 16 loses its digits. It is then below 1.2e-7 of the
    gradient of the result.

    Args:
        logits: Float tensor, shape `(..., T)`.
        mask_logits: Float tensor, shape `(..., T)`, from `relaxed_mask_logits` or
            `bernoulli_mask_logits`.

    Returns:
        Tensor of shape `(..., T)`. The values are at most 0, up to rounding.

    Example:

    >>> F = tf_dropmax.functional
    >>> masks = F.bernoulli_mask_logits(0.5, [0.1, 0.9])  # keeps class 0, drops class 1
    >>> tf.exp(F.target_log_likelihood([0.0, 0.0], masks)).numpy().round(4).tolist()
    [1.0, 0.5]
    """
    arguments = broadcast(to_float(logits), to_float(mask_logits))
    return _target_kernel(*arguments)


class _Likelihood(NamedTuple):
    """The log-likelihood `relative - log_denominator`, and the function of its gradient."""

    relative: tf.Tensor  # o_k - max o. It may overflow to minus infinity.
    log_denominator: tf.Tensor  # log D_k - max o
    gradient: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


def _likelihood(logits, mask_logits):
    relative = logits - tf.reduce_max(logits, axis=-1, keepdims=True)
    weights = tf.exp(relative)
    masks = tf.sigmoid(mask_logits)
    kept = weights * masks  # z w
    total = tf.reduce_sum(kept, axis=-1, keepdims=True) + _LEAST_KEPT
    # The rounding of (1 - z) w is harmless: it is added to S >= z w.
    log_denominator = tf.math.log(weights - kept + total)

    def gradient(upstream):
        # The denominator is computed again, so that fewer tensors wait for this function.
        pull = upstream / (weights - weights * masks + total)
        change = weights * (pull - tf.reduce_sum(pull, axis=-1, keepdims=True))
        by_logits = upstream - weights * pull + masks * change
        return by_logits, _times_sigmoid_slope(y=masks, dy=change)

    return _Likelihood(relative, log_denominator, gradient)


@traced_once
def _target_kernel(logits, mask_logits):
    likelihood = _likelihood(logits, mask_logits)
    value = tf.maximum(likelihood.relative, -LIMIT) - likelihood.log_denominator
    return value, likelihood.gradient


def prior_scores_and_entropy(
    logits: Any,
    retain_logits: Any,
    mask_logits: Any,
    entropy_weight: float | tf.Tensor = 1.0,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Both parts of the objective (15), with masks from the prior (9).

    The score is `score_k = log rho_k + o_k - log D_k - entropy_weight * H(rho_k)`; see
    `target_log_likelihood` for `D_k`. For a target y, the loss, which is the objective (15) with
    the opposite sign, is exactly `-score_y - entropy_weight * sum_t H(rho_t)`. This is the sum of
    the cross entropy with the mask of the target at 1, the KL divergence (10), and the entropy
    regulariser (14) over the other classes.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`.
        mask_logits: Float tensor, shape `(..., T)`, from `relaxed_mask_logits`.
        entropy_weight: Non-negative float or scalar tensor, the paper's lambda. It gets no
            gradient. Defaults to 1.0.

    Returns:
        Tuple `(scores, entropy)`. The scores have shape `(..., T)` and are not normalised. The
        entropy `sum_t H(rho_t)` has shape `(...)`.

    Example:

    >>> F = tf_dropmax.functional
    >>> scores, entropy = F.prior_scores_and_entropy([2.0, -1.0], [0.0, 0.0], [5.0, -5.0])
    >>> round(float(entropy), 4)
    1.3863
    """
    arguments = broadcast(*(to_float(x) for x in (logits, retain_logits, mask_logits)))
    weight = scalar(entropy_weight, arguments[0].dtype)
    return _prior(*arguments, constants=(weight,))


@traced_once
def _prior(logits, retain_logits, mask_logits, weight):
    likelihood = _likelihood(logits, mask_logits)
    linear = _linear_part(likelihood, retain_logits)
    retain = _Sides.of(*_after([linear], retain_logits))
    scores = linear + retain.log_more - weight * retain.entropy

    def gradient(by_scores, by_entropy):
        by_logits, by_masks = likelihood.gradient(by_scores)
        drop = tf.sigmoid(-_after([by_logits, by_masks], retain_logits)[0])
        by_entropies = by_entropy[..., tf.newaxis] - weight * by_scores
        by_retain = by_scores * drop - by_entropies * _times_sigmoid_slope(y=drop, dy=retain_logits)
        by_logits, by_masks = _after([by_retain], by_logits, by_masks)
        return by_logits, by_retain, by_masks, None

    return (scores, tf.reduce_sum(retain.entropy, axis=-1)), gradient


def _linear_part(likelihood, retain_logits):
    """`o_k - log D_k + min(r_k, 0)`. With `log_more` this is `log rho_k + o_k - log D_k`."""
    linear = tf.maximum(likelihood.relative + tf.minimum(retain_logits, 0), -LIMIT)
    return linear - likelihood.log_denominator


def posterior_logits(retain_logits: Any, auxiliary_logits: Any) -> tf.Tensor:
    """Retain logits of the label posterior (NeurIPS 2018): prior plus auxiliary logits.

    Args:
        retain_logits: Float tensor, shape `(..., T)`, of the prior. It gets no gradient.
        auxiliary_logits: Float tensor, shape `(..., T)`, of the classifier that predicts the
            label.

    Returns:
        Tensor of shape `(..., T)`.

    Example:

    >>> tf_dropmax.functional.posterior_logits([1.0, 2.0], [0.5, -3.0]).numpy().tolist()
    [1.5, -1.0]
    """
    return tf.stop_gradient(to_float(retain_logits)) + to_float(auxiliary_logits)


def label_scores_and_entropy(
    logits: Any,
    retain_logits: Any,
    auxiliary_logits: Any,
    mask_logits: Any,
    auxiliary_weight: float | tf.Tensor = 1.0,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Both parts of the objective with masks from the label posterior (NeurIPS 2018).

    For a target y, minus the score is the sum of three terms. In the cross entropy, the mask of the
    target is 1, and the other masks come from the posterior. The KL divergence of the posterior
    from the prior is `-log rho_y` for the target and `KL(q_t || rho_t)`, of two Bernoulli
    variables, for the others. The loss of the auxiliary classifier `s`, times
    `auxiliary_weight`, is `-log s_y - sum_{t != y} log(1 - s_t)`. The entropy regulariser is a sum
    over all classes. It uses the retain probabilities of the prior, and does not depend on the
    label, so it is not part of the score.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`, of the prior.
        auxiliary_logits: Float tensor, shape `(..., T)`, `s = sigmoid(auxiliary_logits)`.
        mask_logits: Float tensor, shape `(..., T)`, from `relaxed_mask_logits` of
            `posterior_logits`.
        auxiliary_weight: Non-negative float or scalar tensor. The paper uses 1.0. It gets no
            gradient. Defaults to 1.0.

    Returns:
        Tuple `(scores, entropy)`. The scores have shape `(..., T)` and are not normalised. The
        entropy `sum_t H(rho_t)` has shape `(...)`.

    Example:

    >>> F = tf_dropmax.functional
    >>> o, r, a = tf.constant([[[2.0, -1.0]], [[3.0, 0.0]], [[1.0, -2.0]]])
    >>> masks = F.relaxed_mask_logits(F.posterior_logits(r, a), F.uniform_draws((1, 2), (0, 1)))
    >>> scores, entropy = F.label_scores_and_entropy(o, r, a, masks)
    >>> scores.shape, entropy.shape
    (TensorShape([1, 2]), TensorShape([1]))
    """
    tensors = (logits, retain_logits, auxiliary_logits, mask_logits)
    arguments = broadcast(*(to_float(x) for x in tensors))
    weight = scalar(auxiliary_weight, arguments[0].dtype)
    return _label(*arguments, constants=(weight,))


@traced_once
def _label(logits, retain_logits, auxiliary_logits, mask_logits, weight):
    retain_logits, auxiliary_logits = (
        tf.clip_by_value(x, -_SUMMED_LIMIT, _SUMMED_LIMIT)
        for x in (retain_logits, auxiliary_logits)
    )
    posterior_logits = retain_logits + auxiliary_logits
    likelihood = _likelihood(logits, mask_logits)
    target = _linear_part(likelihood, retain_logits) + weight * auxiliary_logits
    retain = _Sides.of(*_after([target], retain_logits))
    posterior = _Sides.of(*_after([retain.entropy], posterior_logits))
    # KL(q || rho) is the cross entropy of q and rho minus the entropy of q. The cross entropy is
    # `|r| * against - log_more`, where `against` is the probability under q of the value that is
    # less probable under rho.
    same = retain_logits * posterior_logits >= 0
    against = tf.where(same, posterior.less, 1 - posterior.less)
    divergence = retain.magnitude * against - retain.log_more - posterior.entropy
    # What a target has in place of its term in the sum over all classes.
    target += retain.log_more + divergence
    log_not = _Sides.of(*_after([target], auxiliary_logits)).log_more
    log_not -= tf.maximum(auxiliary_logits, 0)
    scores = target + tf.reduce_sum(weight * log_not - divergence, axis=-1, keepdims=True)

    def gradient(by_scores, by_entropy):
        by_logits, by_masks = likelihood.gradient(by_scores)
        total = tf.reduce_sum(by_scores, axis=-1, keepdims=True)
        by_divergence = by_scores - total
        late = _after([by_logits, by_masks], retain_logits, posterior_logits)
        retain_drop, drop = (tf.sigmoid(-x) for x in late)
        by_retain = by_divergence * drop + total * retain_drop
        slope = _times_sigmoid_slope(y=retain_drop, dy=retain_logits)
        by_retain -= by_entropy[..., tf.newaxis] * slope
        slope = _times_sigmoid_slope(y=drop, dy=auxiliary_logits)
        by_auxiliary = by_divergence * (weight + slope)
        by_auxiliary += (weight * total) * tf.sigmoid(-auxiliary_logits)
        by_logits, by_masks = _after([by_retain, by_auxiliary], by_logits, by_masks)
        return by_logits, by_retain, by_auxiliary, by_masks, None

    return (scores, tf.reduce_sum(retain.entropy, axis=-1)), gradient


def _after(first, *tensors):
    """The same tensors, but a graph computes nothing from them before the tensors in `first`.

    By itself a graph computes what it can as early as it can, and then holds it in memory.
    """
    with tf.control_dependencies(first):
        return [tf.identity(tensor) for tensor in tensors]
