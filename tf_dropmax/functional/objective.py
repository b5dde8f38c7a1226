"""The training objective: one score per class, computed as if that class were the label.

The loss of an example is minus the score of its label, minus the weighted entropy of the masks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tf_dropmax.functional.kernels import traced_once
from tf_dropmax.functional.numerics import LIMIT, broadcast, clip, less_maximum, scalar, to_float

# Mask logits below this count as this. A class that is kept with exp(-80) has no weight.
_DROPPED_MASK = -80.0
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
        return -upstream * _times_drop_slope(retain_logits, tf.sigmoid(-retain_logits))

    return _sigmoid(retain_logits).entropy, gradient


class _Sigmoid(NamedTuple):
    """Functions of a sigmoid's argument that share one exponential and one logarithm."""

    keep: tf.Tensor  # sigmoid(x)
    drop: tf.Tensor  # sigmoid(-x)
    log_keep: tf.Tensor
    log_drop: tf.Tensor
    entropy: tf.Tensor


def _sigmoid(x):
    magnitude = tf.abs(x)
    odds = tf.exp(-magnitude)
    total = 1 + odds
    log_total = tf.math.log1p(odds)
    large, small = 1 / total, odds / total
    positive = x >= 0
    return _Sigmoid(
        keep=tf.where(positive, large, small),
        drop=tf.where(positive, small, large),
        log_keep=tf.maximum(tf.minimum(x, 0), -LIMIT) - log_total,
        log_drop=tf.maximum(-tf.maximum(x, 0), -LIMIT) - log_total,
        entropy=log_total + magnitude * small,
    )


def _times_drop_slope(logits, drop):
    """`r rho (1 - rho)`, given `drop = 1 - rho`. Minus this is the derivative of the entropy."""
    return (drop * logits) * (1 - drop)  # In this order no product overflows.


def target_log_likelihood(logits: Any, mask_logits: Any) -> tf.Tensor:
    """One log-likelihood (5) per class, computed as if it were the target and its mask were 1.

    With `w = exp(o)` and `S = sum_t z_t w_t` over all masks, the result is `o_k - log D_k`, where
    `D_k = S + (1 - z_k) w_k`. `D_k` is a sum of terms that are not negative. The cost is O(T)
    for all T classes. In float32, the gradient with respect to a mask logit above 16 loses its
    digits. It is then below 1.2e-7 of the gradient of the result.

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


def _target_log_likelihood(logits, mask_logits):
    """The value, and a function from its gradient to the gradients of the arguments."""
    mask_logits = tf.maximum(mask_logits, _DROPPED_MASK)
    # log z differs from min(mask_logits, 0) by at most log 2. So, relative to the second
    # maximum, the sum S is between 1/2 and T, and no weight exceeds exp(-_DROPPED_MASK).
    relative = less_maximum(logits)
    relative -= tf.reduce_max(relative + tf.minimum(mask_logits, 0), axis=-1, keepdims=True)
    weights = tf.exp(relative)
    masks = tf.sigmoid(mask_logits)
    kept = weights * masks  # z w
    dropped = weights - kept  # (1 - z) w. Its rounding is harmless: it is added to S >= z w.
    total = tf.reduce_sum(kept, axis=-1, keepdims=True)
    denominator = dropped + total
    value = relative - tf.math.log(denominator)

    def gradient(upstream):
        # Computed again, so that fewer tensors wait for this function.
        kept = weights * masks
        dropped = weights - kept
        pull = upstream / (dropped + total)
        pulls = tf.reduce_sum(pull, axis=-1, keepdims=True)
        by_logits = upstream - dropped * pull - kept * pulls
        return by_logits, masks * dropped * (pull - pulls)

    return value, gradient


_target_kernel = traced_once(_target_log_likelihood)


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
    likelihood, likelihood_gradient = _target_log_likelihood(logits, mask_logits)
    retain = _sigmoid(retain_logits)
    scores = retain.log_keep - weight * retain.entropy + likelihood

    def gradient(by_scores, by_entropy):
        by_logits, by_masks = likelihood_gradient(by_scores)
        with _not_before(by_logits, by_masks):
            drop = tf.sigmoid(-retain_logits)
        slope = weight * by_scores - by_entropy[..., tf.newaxis]
        by_retain = by_scores * drop + slope * _times_drop_slope(retain_logits, drop)
        return by_logits, by_retain, by_masks, None

    return (scores, tf.reduce_sum(retain.entropy, axis=-1)), gradient


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
    return tf.stop_gradient(clip(retain_logits)) + clip(auxiliary_logits)


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
    branches = (
        tf.clip_by_value(clip(x), -_SUMMED_LIMIT, _SUMMED_LIMIT)
        for x in (retain_logits, auxiliary_logits)
    )
    arguments = broadcast(to_float(logits), *branches, to_float(mask_logits))
    weight = scalar(auxiliary_weight, arguments[0].dtype)

    return _label(*arguments, constants=(weight,))


@traced_once
def _label(logits, retain_logits, auxiliary_logits, mask_logits, weight):
    likelihood, likelihood_gradient = _target_log_likelihood(logits, mask_logits)
    retain = _sigmoid(retain_logits)
    posterior = _sigmoid(retain_logits + auxiliary_logits)
    # KL(q || rho), so written that it keeps its digits where q is close to 0 or 1.
    divergence = posterior.keep * (posterior.log_keep - retain.log_keep)
    divergence += posterior.drop * (posterior.log_drop - retain.log_drop)
    # What a target has in place of its term in the sum over all classes.
    target = retain.log_keep + divergence + weight * auxiliary_logits
    others = weight * _sigmoid(auxiliary_logits).log_drop - divergence
    scores = likelihood + target + tf.reduce_sum(others, axis=-1, keepdims=True)

    def gradient(by_scores, by_entropy):
        by_logits, by_masks = likelihood_gradient(by_scores)
        total = tf.reduce_sum(by_scores, axis=-1, keepdims=True)
        by_divergence = by_scores - total
        with _not_before(by_logits, by_masks):
            retain_drop = tf.sigmoid(-retain_logits)
            drop = tf.sigmoid(-retain_logits - auxiliary_logits)
        by_retain = by_scores * retain_drop + by_divergence * (drop - retain_drop)
        slope = _times_drop_slope(retain_logits, retain_drop)
        by_retain -= by_entropy[..., tf.newaxis] * slope
        by_auxiliary = weight * (by_scores - total * tf.sigmoid(auxiliary_logits))
        by_auxiliary += by_divergence * ((drop * auxiliary_logits) * (1 - drop))
        return by_logits, by_retain, by_auxiliary, by_masks, None

    return (scores, tf.reduce_sum(retain.entropy, axis=-1)), gradient


def _not_before(*tensors):
    """A context in which nothing is computed before some tensors.

    A graph computes what it can as early as it can, and then holds it in memory.
    """
    return tf.control_dependencies(tensors)
