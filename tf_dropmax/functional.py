"""The mathematics of DropMax: tensors in, tensors out.

Equation numbers refer to *DropMax: Adaptive Stochastic Softmax* (ICLR 2018 submission; arXiv:1712.07834 is the later
version). Throughout, `logits` are `o = W h + b`, `retain_logits` are `r = V h + c`, the retain probability of a class is
`rho = sigmoid(r)` (4), and `T`, the number of classes, is the size of the last axis.

Every function takes any leading shape, computes in float64 if its inputs are and else in float32, and stays finite,
gradients included, for any finite input: magnitudes beyond 1e37 are treated as 1e37. A NaN or a logit of
plus infinity gives NaN; what else is infinite gives NaN or, where there is one, the limit. The paper's epsilon is taken to
its limit 0, so that a softmax that loses every class to its masks is uniform.

Arguments are not checked here, as `DropMaxHead` does: shapes that do not go together raise TensorFlow's errors, and `samples`
below 1 gives NaN.
"""

import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf

_LIMIT = 1e37  # larger magnitudes are clipped: sums of three still fit into float32
_DROPPED = -3e38  # stands for log 0 beside clipped logits, in float32 too
_DROPPED_MASK = -80.0  # mask logits count as no less: what exp(-80) of a class weighs is as good as nothing
_SAMPLE_STRIDE = 1640531527  # odd, so that the seeds of successive draws never meet


def uniform(shape, seed, dtype="float32"):
    """Draws from the open interval (0, 1), by the Philox generator, which is fast with XLA and without.

    Args:
        shape: Integer tensor or sequence of integers, the shape of the result.
        seed: Integer tensor or pair of integers, shape `(2,)`. The same seed gives the same draws (XLA has a
            stream of its own).
        dtype: `"float32"` or `"float64"`. Defaults to `"float32"`.

    Returns:
        A tensor of the given shape, symmetric about 1/2, never 0 and never 1.

    Example:

    >>> u = tf_dropmax.functional.uniform((2, 3), seed=(1, 2))
    >>> tuple(u.shape)
    (2, 3)
    """
    dtype = tf.as_dtype(dtype)
    # XLA takes 32-bit seeds only.
    seed = tf.cast(tf.math.floormod(tf.cast(seed, tf.int64), 2**31 - 1), tf.int32)
    draws = tf.random.stateless_uniform(shape, seed, dtype=dtype, alg="philox")
    # The draws are multiples of the spacing and include 0; move each to the middle of its cell.
    spacing = 2.0**-23 if dtype == tf.float32 else 2.0**-52
    return draws + spacing / 2


def mask_logits(retain_logits, uniform, temperature=0.1):
    """Logits of relaxed Bernoulli masks: eq. (6) before its sigmoid, `(r + log u - log(1 - u)) / temperature`.

    Args:
        retain_logits: Float tensor, shape `(..., T)`.
        uniform: Float tensor, shape `(..., T)`, draws from the open interval (0, 1).
        temperature: Positive float or scalar tensor. Defaults to 0.1.

    Returns:
        Tensor of shape `(..., T)`. Its sigmoid is the mask `z`; the sigmoid of its negative is `1 - z` without
        cancellation, which is why the functions below ask for these logits rather than for masks.

    Example:

    >>> x = tf_dropmax.functional.mask_logits([0.0, 2.0], uniform=[0.5, 0.5], temperature=0.5)
    >>> x.numpy().tolist()
    [0.0, 4.0]
    """
    retain_logits = _float(retain_logits)
    uniform = tf.cast(uniform, retain_logits.dtype)
    temperature = tf.convert_to_tensor(temperature, dtype_hint=retain_logits.dtype)
    return (retain_logits + tf.math.log(uniform / (1 - uniform))) * (1 / tf.cast(temperature, retain_logits.dtype))


def relaxed_masks(retain_logits, uniform, temperature=0.1):
    """Relaxed Bernoulli (Concrete) masks, eq. (6), distributed as `tfd.RelaxedBernoulli(temperature, retain_logits)`.

    Args:
        retain_logits: Float tensor, shape `(..., T)`.
        uniform: Float tensor, shape `(..., T)`, draws from the open interval (0, 1).
        temperature: Positive float or scalar tensor. Defaults to 0.1.

    Returns:
        Masks in [0, 1], shape `(..., T)`.

    Example:

    >>> z = tf_dropmax.functional.relaxed_masks([0.0, 100.0], uniform=[0.5, 0.5])
    >>> z.numpy().tolist()
    [0.5, 1.0]
    """
    return tf.sigmoid(mask_logits(retain_logits, uniform, temperature))


def bernoulli_mask_logits(retain_probability, uniform):
    """Logits of hard Bernoulli masks, for random DropMax: their sigmoid is exactly 1 (retained) or 0 (dropped).

    Args:
        retain_probability: Float or float tensor that broadcasts to the shape of `uniform`.
        uniform: Float tensor, shape `(..., T)`, draws from the open interval (0, 1).

    Returns:
        Tensor of shape `(..., T)`. No gradient reaches `retain_probability`.

    Example:

    >>> x = tf_dropmax.functional.bernoulli_mask_logits(0.4, [0.3, 0.7])
    >>> tf.sigmoid(x).numpy().tolist()
    [1.0, 0.0]
    """
    uniform = tf.convert_to_tensor(uniform)
    limit = tf.constant(_LIMIT, uniform.dtype)
    return tf.where(uniform < tf.cast(retain_probability, uniform.dtype), limit, -limit)


def entropy(retain_logits):
    """Entropy of every mask, in nats: `H(rho) = -rho log rho - (1 - rho) log(1 - rho)`, the terms of eq. (14).

    Args:
        retain_logits: Float tensor, shape `(..., T)`.

    Returns:
        Tensor of shape `(..., T)`, values in [0, log 2].

    Example:

    >>> h = tf_dropmax.functional.entropy([0.0, 1000.0])
    >>> h.numpy().round(4)
    array([0.6931, 0.    ], dtype=float32)
    """
    return _entropy(_float(retain_logits))


@tf.custom_gradient
def _entropy(retain_logits):
    value, _ = _entropy_and_log_retain(retain_logits)
    return value, lambda upstream: -upstream * _times_drop_slope(retain_logits, tf.sigmoid(-retain_logits))


@tf.custom_gradient
def _log_sigmoid(x):
    value = tf.maximum(tf.minimum(x, 0), -_LIMIT) - tf.math.log(1 + tf.exp(-tf.abs(x)))
    return value, lambda upstream: upstream * tf.sigmoid(-x)


def _entropy_and_log_retain(retain_logits):
    """`H(rho)` and `log rho`, from one exponential and one logarithm."""
    magnitude = tf.abs(retain_logits)
    odds = tf.exp(-magnitude)
    total = 1 + odds
    log_total = tf.math.log1p(odds)
    log_retain = tf.maximum(tf.minimum(retain_logits, 0), -_LIMIT) - log_total
    return log_total + magnitude * (odds / total), log_retain


def _times_drop_slope(retain_logits, drop):
    """`r rho (1 - rho)`, given `drop = 1 - rho`; minus the derivative of the entropy."""
    return (drop * retain_logits) * (1 - drop)  # in this order no product overflows


def target_log_likelihood(logits, mask_logits):
    """For every class k at once: the log-likelihood (5) of k if k were the target, whose mask is 1.

    With `w = exp(o)` and `S = sum_t z_t w_t` over all masks, that is `o_k - log D_k` where `D_k = S + (1 - z_k) w_k`: no
    subtraction, hence no cancellation, and O(T) for all T answers.

    Args:
        logits: Float tensor, shape `(..., T)`.
        mask_logits: Float tensor, shape `(..., T)`, from `mask_logits` or `bernoulli_mask_logits`.

    Returns:
        Tensor of shape `(..., T)`, values at most 0, but for rounding.

    Example:

    >>> masks = tf_dropmax.functional.bernoulli_mask_logits(0.5, [0.1, 0.9])  # class 0 retained, class 1 dropped
    >>> tf.exp(tf_dropmax.functional.target_log_likelihood([0.0, 0.0], masks)).numpy().round(4).tolist()
    [1.0, 0.5]
    """
    return tf.custom_gradient(_target_log_likelihood)(*_broadcast(_float(logits), _float(mask_logits)))


def _target_log_likelihood(logits, mask_logits):
    """The value, and a function from its gradient to those of the arguments."""
    mask_logits = tf.maximum(mask_logits, _DROPPED_MASK)
    # log z is min(mask_logits, 0) but for a log 2 at most. So relative to the second maximum the sum S is between 1/2 and T,
    # and no weight more than exp(-_DROPPED_MASK). The first keeps large logits from swallowing what is added to them.
    relative = tf.maximum(logits - tf.reduce_max(logits, axis=-1, keepdims=True), -_LIMIT)
    relative -= tf.reduce_max(relative + tf.minimum(mask_logits, 0), axis=-1, keepdims=True)
    weights = tf.exp(relative)
    masks = tf.sigmoid(mask_logits)
    kept = weights * masks  # z w
    dropped = weights - kept  # (1 - z) w, rounded; it always stands beside a sum that has z w in it
    total = tf.reduce_sum(kept, axis=-1, keepdims=True)
    value = relative - tf.math.log(dropped + total)

    def gradient(upstream):
        pull = upstream / (dropped + total)
        pulls = tf.reduce_sum(pull, axis=-1, keepdims=True)
        by_masks = masks * dropped * (pull - pulls)
        return upstream - dropped * pull - kept * pulls, by_masks

    return value, gradient


def scores(logits, retain_logits, mask_logits, entropy_weight=1.0):
    """Training scores of adaptive DropMax; minus the target's score is the label-dependent part of eq. (15).

    `score_k = log rho_k + o_k - log D_k - entropy_weight * H(rho_k)`, see `target_log_likelihood` for `D_k`. The objective
    (15), with its sign turned, is then exactly `-score_y - entropy_weight * sum_t H(rho_t)` for a target y: cross entropy
    with the target's mask at 1, KL divergence (10), entropy regulariser (14) over the non-targets.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`.
        mask_logits: Float tensor, shape `(..., T)`, from `mask_logits`.
        entropy_weight: Non-negative float, the paper's lambda. Defaults to 1.0.

    Returns:
        Tensor of shape `(..., T)`. Not normalised.

    Example:

    >>> F = tf_dropmax.functional
    >>> logits, retain_logits = tf.constant([[2.0, -1.0, 0.5]]), tf.constant([[3.0, 0.0, -1.0]])
    >>> masks = F.mask_logits(retain_logits, F.uniform((1, 3), seed=(0, 1)))
    >>> objective = -F.scores(logits, retain_logits, masks)[:, 0] - tf.reduce_sum(F.entropy(retain_logits), -1)
    >>> objective.shape
    TensorShape([1])
    """
    return scores_and_entropy(logits, retain_logits, mask_logits, entropy_weight)[0]


def scores_and_entropy(logits, retain_logits, mask_logits, entropy_weight=1.0):
    """Both halves of eq. (15) at once: `scores`, and `sum_t H(rho_t)`; cheaper than `scores` and `entropy`.

    Args:
        logits, retain_logits, mask_logits, entropy_weight: As for `scores`.

    Returns:
        Tensors of shape `(..., T)` and `(...)`.

    Example:

    >>> F = tf_dropmax.functional
    >>> scores, entropy = F.scores_and_entropy([2.0, -1.0], [0.0, 0.0], [5.0, -5.0])
    >>> round(float(entropy), 4)
    1.3863
    """
    arguments = _broadcast(*(_float(x) for x in (logits, retain_logits, mask_logits)))
    entropy_weight = tf.convert_to_tensor(entropy_weight, dtype_hint=arguments[0].dtype)
    entropy_weight = tf.cast(entropy_weight, arguments[0].dtype)

    @tf.custom_gradient
    def compute(logits, retain_logits, mask_logits):
        likelihood, likelihood_gradient = _target_log_likelihood(logits, mask_logits)
        entropy, log_retain = _entropy_and_log_retain(retain_logits)
        scores = log_retain - entropy_weight * entropy + likelihood

        def gradient(by_scores, by_entropy):
            by_logits, by_masks = likelihood_gradient(by_scores)
            drop = tf.sigmoid(-retain_logits)
            slope = entropy_weight * by_scores - by_entropy[..., None]
            return by_logits, by_scores * drop + slope * _times_drop_slope(retain_logits, drop), by_masks

        return (scores, tf.reduce_sum(entropy, axis=-1)), gradient

    return compute(*arguments)


def posterior_logits(retain_logits, auxiliary_logits):
    """Retain logits of the label posterior (NeurIPS 2018): those of the prior, held fixed, plus the auxiliary ones.

    Args:
        retain_logits: Float tensor, shape `(..., T)`, of the prior. No gradient reaches it.
        auxiliary_logits: Float tensor, shape `(..., T)`, of the classifier that predicts the label.

    Returns:
        Tensor of shape `(..., T)`.

    Example:

    >>> tf_dropmax.functional.posterior_logits([1.0, 2.0], [0.5, -3.0]).numpy().tolist()
    [1.5, -1.0]
    """
    return tf.stop_gradient(_clip(retain_logits)) + _clip(auxiliary_logits)


def posterior_scores(logits, retain_logits, auxiliary_logits, mask_logits, auxiliary_weight=1.0):
    """Training scores with the label posterior (NeurIPS 2018); minus the target's score is all of the loss but the entropy.

    For a target y that loss is: the cross entropy with masks from the posterior, the target's at 1; the KL divergence of
    posterior from prior, `-log rho_y` for the target and that of two Bernoulli variables, `KL(q_t || rho_t)`, for the
    others; and `auxiliary_weight` times the loss of the auxiliary classifier `s`, `-log s_y - sum_{t != y} log(1 - s_t)`.
    The entropy regulariser, over all classes of the prior, does not depend on the label and is not in here.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`, of the prior.
        auxiliary_logits: Float tensor, shape `(..., T)`, `s = sigmoid(auxiliary_logits)`.
        mask_logits: Float tensor, shape `(..., T)`: `mask_logits(posterior_logits(retain_logits, auxiliary_logits), ...)`.
        auxiliary_weight: Non-negative float; 1.0 is as published. Defaults to 1.0.

    Returns:
        Tensor of shape `(..., T)`. Not normalised.

    Example:

    >>> F = tf_dropmax.functional
    >>> o, r, a = tf.constant([[[2.0, -1.0]], [[3.0, 0.0]], [[1.0, -2.0]]])
    >>> masks = F.mask_logits(F.posterior_logits(r, a), F.uniform((1, 2), seed=(0, 1)))
    >>> F.posterior_scores(o, r, a, masks).shape
    TensorShape([1, 2])
    """
    # Sums over classes, times the weight, must stay finite: a narrower range than elsewhere.
    retain_logits, auxiliary_logits = (tf.clip_by_value(_clip(x), -1e28, 1e28) for x in (retain_logits, auxiliary_logits))
    posterior = posterior_logits(retain_logits, auxiliary_logits)
    log_prior, log_posterior = _log_sigmoid(retain_logits), _log_sigmoid(posterior)
    # log(1 - q) = log q - c; written so that neither term loses its digits where q is close to 0 or 1.
    kl = tf.sigmoid(posterior) * (log_posterior - log_prior)
    kl += tf.sigmoid(-posterior) * (_log_sigmoid(-posterior) - _log_sigmoid(-retain_logits))
    target = log_prior + kl + auxiliary_weight * auxiliary_logits  # what a target has in place of what it has in the sum
    every = auxiliary_weight * _log_sigmoid(-auxiliary_logits) - kl
    return target_log_likelihood(logits, mask_logits) + target + tf.reduce_sum(every, axis=-1, keepdims=True)


def softmax(logits):
    """Log-probabilities of the plain softmax, eq. (2), with no masks.

    Args:
        logits: Float tensor, shape `(..., T)`.

    Returns:
        Log-probabilities, shape `(..., T)`.

    Example:

    >>> tf.exp(tf_dropmax.functional.softmax([0.0, 0.0])).numpy().round(4).tolist()
    [0.5, 0.5]
    """
    return tf.nn.log_softmax(_relative(logits))


def expected(logits, retain_logits):
    """Log-probabilities with every mask at its mean, eq. (18): `rho_k exp(o_k) / sum_t rho_t exp(o_t)`.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`.

    Returns:
        Log-probabilities, shape `(..., T)`.

    Example:

    >>> log_p = tf_dropmax.functional.expected([0.0, 0.0], [100.0, 0.0])  # retain probabilities 1 and 1/2
    >>> tf.exp(log_p).numpy().round(4)
    array([0.6667, 0.3333], dtype=float32)
    """
    return _expected(*_broadcast(_float(logits), _float(retain_logits)))


@tf.custom_gradient
def _expected(logits, retain_logits):
    relative = tf.maximum(logits - tf.reduce_max(logits, axis=-1, keepdims=True), -_LIMIT)
    log_p = tf.nn.log_softmax(relative + _log_sigmoid(retain_logits))

    def gradient(upstream):
        by_logits = upstream - tf.exp(log_p) * tf.reduce_sum(upstream, axis=-1, keepdims=True)
        return by_logits, by_logits * tf.sigmoid(-retain_logits)

    return log_p, gradient


def sampled(logits, retain_logits, samples=30, seed=(0, 0)):
    """Log of the mean of the softmax (5) over drawn masks, eq. (17).

    The masks are hard Bernoulli draws. One mask is held at a time, so memory is O(B T) whatever `samples` is. A class that
    no draw retained has an estimate of 0; its log-probability is that of the smallest normal number (-87.3 in float32), to
    stay finite. The gradient reaches `logits` through the same draws; `retain_logits` gets zeros.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`.
        samples: Positive int or scalar int tensor, the paper's S. Defaults to 30.
        seed: Integer tensor or pair of integers, shape `(2,)`. Defaults to `(0, 0)`.

    Returns:
        Log-probabilities, shape `(..., T)`.

    Example:

    >>> log_p = tf_dropmax.functional.sampled([1.0, 0.0], [9.0, -9.0], samples=100, seed=(1, 2))
    >>> bool(log_p[0] > log_p[1])
    True
    """
    logits, retain_logits = _broadcast(_clip(logits), _clip(retain_logits))

    @tf.custom_gradient
    def log_mean(logits, retain_logits):
        (mean,) = _means_over_masks(lambda p, kept: [p], 1, logits, retain_logits, samples, seed)
        mean = tf.maximum(mean, _tiny(logits))

        def gradient(upstream):
            def terms(p, kept):
                pull = upstream * (p / mean)  # the ratio is at most `samples`, whatever the mean
                return [tf.where(kept, pull - p * tf.reduce_sum(pull, axis=-1, keepdims=True), 0)]

            (by_logits,) = _means_over_masks(terms, 1, logits, retain_logits, samples, seed)
            return by_logits, tf.zeros_like(retain_logits)

        return tf.math.log(mean), gradient

    # A NaN retains no class, and would pass for a row that knows nothing.
    broken = _broken(logits, retain_logits)
    return tf.where(broken, tf.constant(np.nan, logits.dtype), log_mean(logits, retain_logits))


def _means_over_masks(terms, count, logits, retain_logits, samples, seed):
    """Means of the `count` tensors `terms(p, kept)`, like `logits` in shape, over drawn masks `kept` and their softmax `p`."""
    retain, seed = tf.sigmoid(retain_logits), tf.cast(seed, tf.int64)
    samples = tf.cast(samples, tf.int64)

    def add(index, *totals):
        draws = uniform(tf.shape(logits), tf.stack([seed[0] + index * _SAMPLE_STRIDE, seed[1]]), logits.dtype)
        # With nothing retained all entries are equal, and the softmax is uniform as it should be.
        kept = draws < retain
        p = tf.nn.softmax(tf.where(kept, logits, tf.constant(_DROPPED, logits.dtype)))
        return index + 1, *[total + term for total, term in zip(totals, terms(p, kept), strict=True)]

    start = (tf.zeros((), tf.int64), *[tf.zeros_like(logits)] * count)
    totals = tf.while_loop(lambda index, *_: index < samples, add, start, parallel_iterations=1)[1:]
    return [total / tf.cast(samples, logits.dtype) for total in totals]


class Uncertainty(NamedTuple):
    """What `uncertainty` returns.

    Attributes:
        entropy: Shape `(...)`, in nats: the entropy of the prediction (16), in all.
        mutual_information: Shape `(...)`, in nats: the part of it that comes from not knowing the mask. The rest is the
            mean entropy of the softmax under one mask.
        spread: Shape `(..., T)`: standard deviation of the probability of a class over the masks.

    Example:

    >>> result = tf_dropmax.functional.uncertainty([0.0, 0.0], [100.0, 100.0])  # there is one mask only
    >>> [round(float(value), 4) for value in (result.entropy, result.mutual_information)]
    [0.6931, 0.0]
    """

    entropy: tf.Tensor
    mutual_information: tf.Tensor
    spread: tf.Tensor


def uncertainty(logits, retain_logits, samples=100, seed=(0, 0)):
    """Uncertainty of the prediction over hard Bernoulli masks `z`, with `p(z)` the softmax (5).

    With `m = E[p(z)]`, eq. (16), by `exact`: the entropy `H(m)`; the mutual information `H(m) - E[H(p(z))]`, as the mean
    over drawn masks of `KL(p(z) || m)`, which is never negative and, unlike the difference of two estimates, right on
    average; and the root of the mean of `(p_k(z) - m_k)^2`. One mask is held at a time, as in `sampled`. No gradient.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`.
        samples: Positive int or scalar int tensor, number of masks. Defaults to 100.
        seed: Integer tensor or pair of integers, shape `(2,)`. Defaults to `(0, 0)`.

    Returns:
        An `Uncertainty` of three tensors. The entropy is exact as `exact` is; the errors of the other two fall as
        `1 / sqrt(samples)`, so that the mutual information may come out a little above the entropy.

    Example:

    >>> result = tf_dropmax.functional.uncertainty([9.0, 0.0], [0.0, 100.0])  # class 0, or else class 1
    >>> result.spread.numpy().round(1)
    array([0.5, 0.5], dtype=float32)
    """
    logits, retain_logits = (tf.stop_gradient(x) for x in _broadcast(_clip(logits), _clip(retain_logits)))
    log_mean = exact(logits, retain_logits)
    mean = tf.exp(log_mean)

    def terms(p, kept):
        return [tf.math.xlogy(p, p) - p * log_mean, tf.square(p - mean)]

    divergence, square = _means_over_masks(terms, 2, logits, retain_logits, samples, seed)
    entropy = -tf.reduce_sum(mean * log_mean, axis=-1)
    return Uncertainty(entropy, tf.maximum(tf.reduce_sum(divergence, axis=-1), 0), tf.sqrt(square))


def exact(logits, retain_logits):
    """Log of the expectation (16) itself, over all 2^T masks, by quadrature.

    For independent masks and `a > 0`, `1/a = int_0^inf exp(-s a) ds`. With `phi_t(s) = 1 - rho_t + rho_t exp(-s w_t)` and
    `w = exp(o)`

        p_k = int_0^inf rho_k w_k exp(-s w_k) prod_{t != k} phi_t(s) ds + prod_t (1 - rho_t) / T

    which is smooth in `log s`, where the trapezoid rule converges geometrically. One pass over the nodes serves all k, so
    memory is O(B T) and time O(Q B T), with Q from about 40 to 170 nodes in float32 and twice that in float64, by the widest
    row of the batch.

    The error is below 1e-5 in probability (float32; 1e-12 in float64) for logit spreads up to 60. If a row is wider, then in
    all rows gaps between neighbouring logits count as at most 30, logits further than 400 below the largest count as 400
    below, and the nodes may be five times as many. A
    probability too small for the quadrature is replaced by its lower bound, by Jensen's inequality,
    `rho_k w_k / (w_k + sum_{t != k} rho_t w_t)`, so that log-probabilities are finite and of a sensible size. Gradients are
    by quadrature too.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`.

    Returns:
        Log-probabilities, shape `(..., T)`.

    Example:

    >>> log_p = tf_dropmax.functional.exact([0.0, 0.0], [0.0, 0.0])  # (1/2 + 1 + 0 + 1/2) / 4 for either class
    >>> tf.exp(log_p).numpy().round(4).tolist()
    [0.5, 0.5]
    """
    logits, retain_logits = _broadcast(_clip(logits), _clip(retain_logits))
    shape, classes = tf.shape(logits), logits.shape[-1]
    rows = [tf.reshape(x, (-1, shape[-1] if classes is None else classes)) for x in (logits, retain_logits)]
    # A row with a NaN must not touch the others, with which it shares the nodes.
    broken = _broken(*rows)
    rows = [tf.where(broken, tf.zeros_like(x), x) for x in rows]
    log_p = tf.maximum(_log_quadrature(*rows), _jensen_bound(*rows))
    log_p = tf.nn.log_softmax(log_p)  # takes away what the quadrature missed, 1e-7 or so
    log_p = tf.where(broken, tf.constant(np.nan, log_p.dtype), log_p)
    return tf.ensure_shape(tf.reshape(log_p, shape), logits.shape)


def _jensen_bound(logits, retain_logits):
    return _log_sigmoid(retain_logits) + target_log_likelihood(logits, retain_logits)


@tf.custom_gradient
def _log_quadrature(logits, retain_logits):
    """Log of the quadrature of eq. (16) for rows `(B, T)`; not normalised; never below the log of the smallest float."""
    double = logits.dtype == tf.float64
    # The step decides the error of the trapezoid rule, exp(-pi^2 / step); the other two what is cut off at the ends.
    step, lower_mass, upper = (0.3, 1e-15, 3.6) if double else (0.5, 1e-7, 3.6)
    finished = tf.constant(-650.0 if double else -69.0, logits.dtype)  # of the log of what is still to come
    tiny = _tiny(logits)

    relative = _narrow(logits)
    log_retain = _log_sigmoid(retain_logits)
    log_drop = _log_sigmoid(-retain_logits)
    retain, drop = tf.exp(log_retain), tf.exp(log_drop)
    # Below `first` the integrals hold less than `lower_mass`, as 1 - prod phi <= s sum rho w.
    first = tf.math.log(tf.constant(lower_mass, logits.dtype))
    first -= tf.reduce_logsumexp(relative + log_retain, axis=-1, keepdims=True)
    last = upper - tf.reduce_min(relative, axis=-1, keepdims=True)
    nodes = tf.cast(tf.math.ceil(tf.reduce_max(last - first) / step), tf.int32)
    nodes = tf.maximum(nodes, 1)
    width = (last - first) / tf.cast(nodes, logits.dtype)  # (B, 1): every row its own range, all rows as many nodes

    def integrate(terms, count):
        """Sums `terms(y, exp(-y), 1 - exp(-y), phi, density)` over the nodes, `density_k` the integrand of p_k in log s."""

        def add(index, _, *totals):
            position = first + width * tf.cast(index, logits.dtype)
            y = tf.exp(tf.minimum(position + relative, 5.0))  # s w; at exp(5), exp(-s w) is 0 already
            decay = tf.exp(-y)
            loss = tf.tanh(0.5 * y) * (1 + decay)  # 1 - exp(-y)
            phi = tf.maximum(drop + retain * decay, tiny)
            # Near 1, phi has lost digits that a sum over many classes would miss: 1 - phi is `retain * loss`.
            log_phi = tf.math.log(phi) + tf.where(phi > 0.5, (1 - phi - retain * loss) / phi, 0)
            survival = tf.reduce_sum(log_phi, axis=-1, keepdims=True)
            density = retain * y * decay * tf.exp(survival - log_phi)
            totals = [total + term for total, term in zip(totals, terms(y, decay, loss, phi, density), strict=True)]
            return index + 1, tf.reduce_max(survival), *totals

        def more(index, survival, *_):
            return tf.logical_and(index <= nodes, survival > finished)

        start = (tf.zeros((), tf.int32), tf.zeros((), logits.dtype), *[tf.zeros_like(logits)] * count)
        totals = tf.while_loop(more, add, start, parallel_iterations=1)[2:]
        return [width * total for total in totals]

    none_retained = tf.exp(tf.reduce_sum(log_drop, axis=-1, keepdims=True)) / tf.cast(tf.shape(logits)[-1], logits.dtype)
    (mean,) = integrate(lambda y, decay, loss, phi, density: [density], 1)
    p = tf.maximum(mean + none_retained, tiny)

    def gradient(upstream):
        def terms(y, decay, loss, phi, density):
            pull = upstream * (density / p)
            others = tf.reduce_sum(pull, axis=-1, keepdims=True) - pull
            slope = retain / phi
            return pull * (1 - y) - others * slope * y * decay, pull * drop - others * slope * drop * loss

        grad_logits, grad_retain = integrate(terms, 2)
        rest = tf.reduce_sum(upstream * (none_retained / p), axis=-1, keepdims=True)
        return grad_logits, grad_retain - retain * rest

    return tf.math.log(p), gradient


def _narrow(logits):
    """Rows `(B, T)` less their maximum. If one is wider than 60, gaps are capped, which alters no probability by 1e-13 T."""
    relative = _relative(logits)

    def cap():
        order = tf.argsort(logits, axis=-1, direction="DESCENDING")
        ranked = tf.gather(logits, order, batch_dims=1)
        gaps = tf.minimum(ranked[:, :-1] - ranked[:, 1:], 30.0)
        capped = tf.pad(-tf.cumsum(gaps, axis=-1), [[0, 0], [1, 0]])
        return tf.maximum(tf.gather(capped, tf.argsort(order, axis=-1), batch_dims=1), -400.0)

    return tf.cond(tf.reduce_min(relative) < -60.0, cap, lambda: relative)


def _float(x):
    """An argument as float32 or float64."""
    x = tf.convert_to_tensor(x)
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


def _clip(x):
    """An argument as float32 or float64, in the range that is safe; what is not finite becomes NaN."""
    x = _float(x)
    return tf.where(tf.math.is_finite(x), tf.clip_by_value(x, -_LIMIT, _LIMIT), tf.constant(np.nan, x.dtype))


def _broken(logits, retain_logits):
    """Which rows have a NaN, shape `(..., 1)`."""
    return tf.reduce_any(tf.math.is_nan(logits + retain_logits), axis=-1, keepdims=True)


def sampled_softmax_scores(logits, class_probabilities, uniform, sample_size):
    """For every class k at once: the log-likelihood of k, if k is the target, among the target and a sample of classes.

    The sample is drawn without replacement: class t arrives at time `-log(u_t) / Q_t`, and the first `sample_size` to arrive
    are in. At the time when the next one would arrive, a class is in with probability `1 - exp(-Q_t time)`; the logits are
    corrected by the log of it (learned or uniform Q, Jean et al., 2014). A target that is in the sample counts once.

    Args:
        logits: Float tensor, shape `(..., T)`.
        class_probabilities: Float tensor, shape `(T,)`, the distribution Q; positive.
        uniform: Float tensor, shape `(T,)`, draws from the open interval (0, 1).
        sample_size: Int, at least 1 and below T.

    Returns:
        Tensor of shape `(..., T)`, values at most 0.

    Example:

    >>> scores = tf_dropmax.functional.sampled_softmax_scores([0.0] * 4, [0.25] * 4, [0.9, 0.8, 0.2, 0.1], sample_size=2)
    >>> tf.exp(scores).numpy().round(4)  # the first two are in the sample
    array([0.5   , 0.5   , 0.3333, 0.3333], dtype=float32)
    """
    logits = _clip(logits)
    class_probabilities = tf.convert_to_tensor(class_probabilities, logits.dtype)
    arrival = -tf.math.log(tf.convert_to_tensor(uniform, logits.dtype)) / class_probabilities
    time = tf.sort(arrival)[sample_size]
    log_chance = tf.math.log(-tf.math.expm1(-class_probabilities * time))
    limit = tf.constant(_LIMIT, logits.dtype)
    sample = tf.where(arrival < time, limit, -limit)
    return target_log_likelihood(logits - log_chance, sample + tf.zeros_like(logits))


def sparsemax(logits):
    """The Euclidean projection of the logits onto the probability simplex (Martins & Astudillo, 2016).

    Args:
        logits: Float tensor, shape `(..., T)`.

    Returns:
        Probabilities, shape `(..., T)`, many of them exactly 0.

    Example:

    >>> tf_dropmax.functional.sparsemax([0.0, 0.5, 1.0]).numpy().tolist()
    [0.0, 0.25, 0.75]
    """
    return _sparsemax(_relative(logits))


@tf.custom_gradient
def _sparsemax(relative):
    ranked = tf.sort(relative, direction="DESCENDING", axis=-1)
    # The logits that stay are within 1 of the largest: what is further below may be cut off, lest the sums overflow.
    sums = tf.cumsum(tf.maximum(ranked, -2), axis=-1)
    count = tf.range(1, tf.shape(relative)[-1] + 1)
    inside = 1 + tf.cast(count, ranked.dtype) * tf.maximum(ranked, -2) > sums
    size = tf.reduce_sum(tf.cast(inside, tf.int32), axis=-1, keepdims=True)
    total = tf.reduce_sum(tf.where(inside, tf.maximum(ranked, -2), 0), axis=-1, keepdims=True)
    threshold = (total - 1) / tf.cast(size, ranked.dtype)
    probabilities = tf.maximum(relative - threshold, 0)

    def gradient(upstream):
        support = tf.cast(probabilities > 0, upstream.dtype)
        mean = tf.reduce_sum(upstream * support, axis=-1, keepdims=True) / tf.reduce_sum(support, axis=-1, keepdims=True)
        return support * (upstream - mean)

    return probabilities, gradient


def sparsemax_scores(logits):
    """Scores whose negative is, for every class k at once, the sparsemax loss if k is the target.

    `score_k = z_k - sum_{t in support} (z_t^2 - tau^2) / 2 - 1/2`; its gradient is `1_k - sparsemax(z)`.

    Args:
        logits: Float tensor, shape `(..., T)`.

    Returns:
        Tensor of shape `(..., T)`, values at most 0.

    Example:

    >>> tf_dropmax.functional.sparsemax_scores([5.0, 0.0]).numpy().tolist()
    [0.0, -5.0]
    """
    return _sparsemax_scores(_relative(logits))


@tf.custom_gradient
def _sparsemax_scores(relative):
    probabilities = _sparsemax(relative)
    # With p = z - tau on the support: sum (z^2 - tau^2) = sum p (2 z - p).
    conjugate = tf.reduce_sum(probabilities * (2 * tf.maximum(relative, -2) - probabilities), axis=-1, keepdims=True) / 2

    def gradient(upstream):
        return upstream - probabilities * tf.reduce_sum(upstream, axis=-1, keepdims=True)

    return tf.minimum(relative - conjugate - 0.5, 0), gradient


def _relative(logits):
    """Logits less their maximum, which changes no softmax, and keeps what is added to them from being rounded away."""
    logits = _clip(logits)
    return logits - tf.stop_gradient(tf.reduce_max(logits, axis=-1, keepdims=True))


def _broadcast(*arguments):
    """All in the shape that they have together; those that have it already are not copied."""
    shapes = [argument.shape for argument in arguments]
    if shapes[0].is_fully_defined() and shapes.count(shapes[0]) == len(shapes):
        return arguments
    same_rank = shapes[0].rank is not None and all(shape.rank == shapes[0].rank for shape in shapes)
    # ONNX does not know the operation behind `broadcast_dynamic_shape`.
    join = (lambda one, other: tf.where(one == 1, other, one)) if same_rank else tf.broadcast_dynamic_shape
    common = functools.reduce(join, [tf.shape(argument) for argument in arguments])
    static = functools.reduce(tf.broadcast_static_shape, shapes)
    return [tf.ensure_shape(tf.broadcast_to(argument, common), static) for argument in arguments]


def _tiny(x):
    return tf.constant(np.finfo(x.dtype.as_numpy_dtype).tiny, x.dtype)
