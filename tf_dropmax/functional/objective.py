"""The training objective: one score per class, computed as if that class were the label.

The loss of an example is minus the score of its label, minus the weighted entropy of the masks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tf_dropmax.functional.kernels import traced_once
from tf_dropmax.functional.numerics import (
    broadcast,
    minus,
    relative_to_maximum,
    scalar,
    to_float,
)

# Without XLA every operation is a pass over memory, so these kernels use few operations.

# This times the largest weight, about exp(-80), is added to the sum of the kept weights. The
# gradient takes it as a constant.
_LEAST_KEPT = 2.0**-115


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
        return -upstream * _scaled_slope(retain_logits, tf.sigmoid(minus(retain_logits)))

    return _Mask.of(retain_logits).entropy, gradient


class _Mask(NamedTuple):
    """Functions of the logit `x` of a mask. Of its two values, 0 and 1, one is more probable."""

    magnitude: tf.Tensor  # |x|
    smaller: tf.Tensor  # the smaller one of the two probabilities
    log_larger: tf.Tensor  # the logarithm of the larger one
    entropy: tf.Tensor

    @classmethod
    def of(cls, x):
        magnitude = tf.abs(x)
        smaller = tf.sigmoid(minus(magnitude))
        log_larger = tf.math.log1p(minus(smaller))
        return cls(magnitude, smaller, log_larger, entropy=magnitude * smaller - log_larger)


def _scaled_slope(factor, probability):
    """`factor * p * (1 - p)` in one operation. It does not overflow: `p` is in [0, 1]."""
    return tf.raw_ops.SigmoidGrad(y=probability, dy=factor)


def target_log_likelihood(logits: Any, mask_logits: Any) -> tf.Tensor:
    """One log-likelihood (5) per class, computed as if it were the target and its mask were 1.

    With `w = exp(o)` and `S = sum_t z_t w_t` over all masks, the result is `o_k - log D_k`, where
    `D_k = S + (1 - z_k) w_k`. `D_k` is a sum of terms that are not negative. The cost is O(T)
    for all T classes. About exp(-80) times the largest weight is added to `S`, so that it is never
    0. In float32, the gradient with respect to a mask logit above 16 loses its digits. It is then
    below 1.2e-7 of the gradient of the result.

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
    return _target_log_likelihood(*broadcast(to_float(logits), to_float(mask_logits)))


def _likelihood(logits, mask_logits):
    """The log-likelihoods, and the function of their gradient."""
    relative = relative_to_maximum(logits)
    weights = tf.exp(relative)
    masks = tf.sigmoid(mask_logits)
    kept = weights * masks  # z w
    total = tf.reduce_sum(kept, axis=-1, keepdims=True) + _LEAST_KEPT
    # The rounding of (1 - z) w is harmless: it is added to S >= z w.
    log_denominator = tf.math.log(weights - kept + total)

    def gradient(upstream):
        # Computed again, so that fewer tensors wait for this function. No factor exceeds 1.
        kept = weights * masks
        pull = upstream * (total / (weights - kept + total))  # total / D = 1 - (1 - z) w / D
        pulls = tf.reduce_sum(pull, axis=-1, keepdims=True)
        share = kept / total
        by_logits = pull - share * pulls
        pull, delayed = _after([by_logits], pull, masks)
        return by_logits, (pull - pulls) * share * (1 - delayed)

    return relative - log_denominator, gradient


_target_log_likelihood = traced_once(_likelihood)


def prior_scores_and_entropy(
    logits: Any,
    retain_logits: Any,
    mask_logits: Any,
    entropy_weight: float | tf.Tensor = 1.0,
    kl_weight: float | tf.Tensor = 1.0,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Both parts of the objective (15), with masks from the prior (9).

    The score is `score_k = kl_weight * log rho_k + o_k - log D_k - entropy_weight * H(rho_k)`; see
    `target_log_likelihood` for `D_k`. For a target y and a `kl_weight` of 1, the loss, which is the
    objective (15) with the opposite sign, is exactly `-score_y - entropy_weight * sum_t H(rho_t)`.
    This is the sum of the cross entropy with the mask of the target at 1, the KL divergence (10),
    and the entropy regulariser (14) over the other classes.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`.
        mask_logits: Float tensor, shape `(..., T)`, from `relaxed_mask_logits`.
        entropy_weight: Non-negative float or scalar tensor, the paper's lambda. It gets no
            gradient. Defaults to 1.0.
        kl_weight: Non-negative float or scalar tensor, the weight of the KL divergence. It gets no
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
    weights = (scalar(weight, arguments[0].dtype) for weight in (entropy_weight, kl_weight))
    return _prior(*arguments, *weights)


@traced_once
def _prior(logits, retain_logits, mask_logits, entropy_weight, kl_weight):
    log_likelihood, likelihood_gradient = _likelihood(logits, mask_logits)
    retain = _Mask.of(*_after([log_likelihood], retain_logits))
    log_retain = tf.minimum(retain_logits, 0) + retain.log_larger
    entropy = tf.reduce_sum(retain.entropy, axis=-1)
    (delayed,) = _after([entropy], retain.entropy)
    scores = log_likelihood + kl_weight * log_retain - entropy_weight * delayed

    def gradient(by_scores, by_entropy):
        by_logits, by_masks = likelihood_gradient(by_scores)
        delayed, by_scores = _after([by_logits, by_masks], retain_logits, by_scores)
        drop = tf.sigmoid(minus(delayed))
        by_entropies = by_entropy[..., tf.newaxis] - entropy_weight * by_scores
        by_retain = kl_weight * by_scores * drop - by_entropies * _scaled_slope(retain_logits, drop)
        return by_logits, by_retain, by_masks, None, None

    return (scores, entropy), gradient


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
    kl_weight: float | tf.Tensor = 1.0,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Both parts of the objective with masks from the label posterior (NeurIPS 2018).

    For a target y, minus the score is the sum of three terms. In the cross entropy, the mask of the
    target is 1, and the other masks come from the posterior. The second term is `kl_weight` times
    the KL divergence of the posterior from the prior. The divergence is `-log rho_y` for the target
    plus `KL(q_t || rho_t)`, of two Bernoulli variables, for the others. The third is
    `auxiliary_weight` times the loss of the auxiliary classifier `s`, which is
    `-log s_y - sum_{t != y} log(1 - s_t)`. The entropy regulariser is a sum over all classes. It
    uses the retain probabilities of the prior, and does not depend on the label, so it is not part
    of the score.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`, of the prior.
        auxiliary_logits: Float tensor, shape `(..., T)`, `s = sigmoid(auxiliary_logits)`.
        mask_logits: Float tensor, shape `(..., T)`, from `relaxed_mask_logits` of
            `posterior_logits`.
        auxiliary_weight: Non-negative float or scalar tensor. The paper uses 1.0. It gets no
            gradient. Defaults to 1.0.
        kl_weight: Non-negative float or scalar tensor, the weight of the KL divergence. It gets no
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
    weights = (scalar(weight, arguments[0].dtype) for weight in (auxiliary_weight, kl_weight))
    return _label(*arguments, *weights)


@traced_once
def _label(logits, retain_logits, auxiliary_logits, mask_logits, auxiliary_weight, kl_weight):
    r, a = retain_logits, auxiliary_logits
    log_likelihood, likelihood_gradient = _likelihood(logits, mask_logits)
    retain, posterior = _Mask.of(r), _Mask.of(r + a)
    # KL(q || rho) is the cross entropy of q and rho minus the entropy of q. The cross entropy is
    # `|r| * unlikely - log_larger`, where `unlikely` is the probability under q of the value that
    # is less probable under rho.
    same_side = r * (r + a) >= 0
    unlikely = tf.where(same_side, posterior.smaller, 1 - posterior.smaller)
    divergence = retain.magnitude * unlikely - retain.log_larger - posterior.entropy
    # The target has `log rho` and `log s` where the other classes have minus their divergence and
    # `log(1 - s)`. The difference of the last two is `a`.
    log_retain = tf.minimum(r, 0) + retain.log_larger
    target = log_likelihood + kl_weight * (log_retain + divergence) + auxiliary_weight * a
    log_not = _Mask.of(a).log_larger - tf.maximum(a, 0)
    other = auxiliary_weight * log_not - kl_weight * divergence
    others = tf.reduce_sum(other, axis=-1, keepdims=True)

    def gradient(by_scores, by_entropy):
        by_logits, by_masks = likelihood_gradient(by_scores)
        # For second derivatives: `a` as posterior logit, which gives none to r, minus r.
        shift = a + (tf.stop_gradient(r) - r)
        retain_drop, drop = (tf.sigmoid(minus(x)) for x in (r, r + shift))
        total = tf.reduce_sum(by_scores, axis=-1, keepdims=True)
        by_divergence = kl_weight * (by_scores - total)
        by_retain = by_divergence * drop + (kl_weight * total) * retain_drop
        by_retain -= by_entropy[..., tf.newaxis] * _scaled_slope(r, retain_drop)
        by_auxiliary = auxiliary_weight * by_scores - (auxiliary_weight * total) * tf.sigmoid(a)
        by_auxiliary += by_divergence * _scaled_slope(shift, drop)
        return by_logits, by_retain, by_auxiliary, by_masks, None, None

    return (target + others, tf.reduce_sum(retain.entropy, axis=-1)), gradient


def _after(first, *tensors):
    """The same tensors, but a graph computes nothing from them before the tensors in `first`.

    By itself a graph computes what it can as early as it can, and then holds it in memory. With 256
    rows and 20,000 classes on a CPU, a training step with `posterior="prior"` then needs 1.3 times
    as much memory.
    """
    with tf.control_dependencies(first):
        return [tf.identity(tensor) for tensor in tensors]
