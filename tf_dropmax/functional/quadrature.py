"""The expectation (16) over all masks, by a one-dimensional quadrature."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tf_dropmax.functional.numerics import (
    broadcast,
    clip,
    less_maximum,
    log_sigmoid,
    rows_with_nan,
    tiny,
)
from tf_dropmax.functional.objective import target_log_likelihood


def exact_log_probabilities(logits: Any, retain_logits: Any) -> tf.Tensor:
    """Log of the expectation (16) itself, over all 2^T masks.

    For independent masks and `a > 0`, `1/a = int_0^inf exp(-s a) ds`. With
    `phi_t(s) = 1 - rho_t + rho_t exp(-s w_t)` and `w = exp(o)`

        p_k = int_0^inf rho_k w_k exp(-s w_k) prod_{t != k} phi_t(s) ds + prod_t (1 - rho_t) / T

    The integrand is smooth in `log s`, where the trapezoid rule converges geometrically. For small
    `s` it is all but linear in `s`, so the nodes lie twice as far apart there: the rule is applied
    in `v`, with `log s = v - log(1 + exp(-v)) + constant`. One pass over the nodes serves all
    classes. Memory is O(B T). Time is O(Q B T), with Q from about 20 to 115 nodes in float32 and
    three times that in float64, by the widest row of the batch.

    The error of a probability is below 1e-5 in float32 and 1e-12 in float64 for logit spreads up
    to 60. If a row is wider, then in all rows gaps between neighbouring logits count as at most
    30, logits more than 400 below the largest count as 400 below, and there may be five times as
    many nodes. A probability too small for the quadrature is replaced by its lower bound from
    Jensen's inequality, `rho_k w_k / (w_k + sum_{t != k} rho_t w_t)`. So log-probabilities are
    finite and of a sensible size. The gradients are computed by quadrature too.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`.

    Returns:
        Log-probabilities, shape `(..., T)`.

    Example:

    >>> F = tf_dropmax.functional
    >>> log_p = F.exact_log_probabilities([0.0, 0.0], [0.0, 0.0])  # (1/2 + 1 + 0 + 1/2) / 4
    >>> tf.exp(log_p).numpy().round(4).tolist()
    [0.5, 0.5]
    """
    logits, retain_logits = broadcast(clip(logits), clip(retain_logits))
    shape, classes = tf.shape(logits), logits.shape[-1]
    flat = (-1, shape[-1] if classes is None else classes)
    rows = [tf.reshape(x, flat) for x in (logits, retain_logits)]
    # The rows share their nodes. A row with a NaN must not change the others.
    broken = rows_with_nan(*rows)
    rows = [tf.where(broken, tf.zeros_like(x), x) for x in rows]
    log_p = tf.maximum(_log_quadrature(*rows), _jensen_bound(*rows))
    log_p = tf.nn.log_softmax(log_p)  # Removes the error of the sum, about 1e-7.
    log_p = tf.where(broken, tf.constant(np.nan, log_p.dtype), log_p)
    return tf.ensure_shape(tf.reshape(log_p, shape), logits.shape)


def _jensen_bound(logits, retain_logits):
    return log_sigmoid(retain_logits) + target_log_likelihood(logits, retain_logits)


@tf.custom_gradient
def _log_quadrature(logits, retain_logits):
    """Log of the quadrature of eq. (16) for rows `(B, T)`.

    It is not normalised, and never below the log of the smallest float.
    """
    double = logits.dtype == tf.float64
    # The step and the margin, by which the bend lies below the first weights, decide the error of
    # the trapezoid rule. The other two decide what is cut off at the ends.
    step, margin, lower_mass, upper = (0.3, 7.0, 1e-13, 3.5) if double else (0.64, 3.5, 1e-6, 2.6)
    # The loop ends when the log of what is still to come is below this.
    finished = tf.constant(-650.0 if double else -69.0, logits.dtype)
    smallest = tiny(logits)

    relative = _narrow(logits)
    log_retain = log_sigmoid(retain_logits)
    log_drop = log_sigmoid(-retain_logits)
    retain, drop = tf.exp(log_retain), tf.exp(log_drop)
    # At the bend, v = 0. At the first node the integrals hold less than `lower_mass`, because
    # 1 - prod phi <= s sum rho w. At the last node the smallest weight has decayed.
    bend = -margin - tf.reduce_logsumexp(relative + log_retain, axis=-1, keepdims=True)
    first = _bent(tf.constant(np.log(lower_mass) + margin, logits.dtype))
    last = _bent(upper - tf.reduce_min(relative, axis=-1, keepdims=True) - bend)
    nodes = tf.cast(tf.math.ceil(tf.reduce_max(last - first) / step), tf.int32)
    nodes = tf.maximum(nodes, 1)
    # Shape (B, 1): every row has its own range, and all rows have as many nodes.
    width = (last - first) / tf.cast(nodes, logits.dtype)

    def integrate(terms, count):
        """Sums `terms(y, exp(-y), 1 - exp(-y), phi, density)` over the nodes, with `y = s w`.

        `density_k` is the integrand of `p_k` as a function of `v`.
        """

        def add(index, _, *totals):
            v = first + width * tf.cast(index, logits.dtype)
            log_s = bend + v - tf.math.log(1 + tf.exp(-v))
            log_slope = tf.math.log(2 - tf.sigmoid(v))  # of log s as a function of v
            y = tf.exp(tf.minimum(log_s + relative, 5.0))  # exp(-exp(5)) is 0 already.
            decay = tf.exp(-y)
            loss = tf.tanh(0.5 * y) * (1 + decay)  # 1 - exp(-y)
            phi = tf.maximum(drop + retain * decay, smallest)
            # Near 1, phi has lost digits that matter in a sum over many classes. There
            # 1 - phi = retain * loss corrects the logarithm.
            log_phi = tf.math.log(phi) + tf.where(phi > 0.5, (1 - phi - retain * loss) / phi, 0)
            survival = tf.reduce_sum(log_phi, axis=-1, keepdims=True)
            density = retain * y * decay * tf.exp(survival + log_slope - log_phi)
            added = terms(y, decay, loss, phi, density)
            sums = [total + term for total, term in zip(totals, added, strict=True)]
            return index + 1, tf.reduce_max(survival), *sums

        def more(index, survival, *_):
            return tf.logical_and(index <= nodes, survival > finished)

        zeros = [tf.zeros_like(logits)] * count
        start = (tf.zeros((), tf.int32), tf.zeros((), logits.dtype), *zeros)
        totals = tf.while_loop(more, add, start, parallel_iterations=1)[2:]
        return [width * total for total in totals]

    classes = tf.cast(tf.shape(logits)[-1], logits.dtype)
    none_retained = tf.exp(tf.reduce_sum(log_drop, axis=-1, keepdims=True)) / classes
    (mean,) = integrate(lambda y, decay, loss, phi, density: [density], 1)
    p = tf.maximum(mean + none_retained, smallest)

    def gradient(upstream):
        def terms(y, decay, loss, phi, density):
            pull = upstream * (density / p)
            others = tf.reduce_sum(pull, axis=-1, keepdims=True) - pull
            slope = others * retain / phi
            return pull * (1 - y) - slope * y * decay, pull * drop - slope * drop * loss

        grad_logits, grad_retain = integrate(terms, 2)
        rest = tf.reduce_sum(upstream * (none_retained / p), axis=-1, keepdims=True)
        return grad_logits, grad_retain - retain * rest

    return tf.math.log(p), gradient


def _bent(log_s):
    """The `v` of which `v - log(1 + exp(-v))` is `log_s`: `log_s / 2 + asinh(exp(log_s / 2) / 2)`.

    ONNX and LiteRT have no `asinh` in common.
    """
    root = tf.exp(tf.minimum(log_s / 2, 30.0))
    by_formula = log_s / 2 + tf.math.log((root + tf.sqrt(root * root + 4)) / 2)
    return tf.where(log_s > 60.0, log_s, by_formula)


def _narrow(logits):
    """Rows `(B, T)` minus their maximum, with capped gaps if a row is wider than 60.

    The cap changes no probability by more than 1e-13 T.
    """
    relative = less_maximum(logits)

    def cap():
        # `top_k` and not `argsort`: `vectorized_map` needs a static number of classes.
        classes = logits.shape[-1] or tf.shape(logits)[-1]
        ranked, order = tf.math.top_k(logits, classes)
        gaps = tf.minimum(ranked[:, :-1] - ranked[:, 1:], 30.0)
        capped = tf.pad(-tf.cumsum(gaps, axis=-1), [[0, 0], [1, 0]])
        rank = tf.math.top_k(-order, classes).indices
        return tf.maximum(tf.gather(capped, rank, batch_dims=1), -400.0)

    return tf.cond(tf.reduce_min(relative) < -60.0, cap, lambda: relative)
