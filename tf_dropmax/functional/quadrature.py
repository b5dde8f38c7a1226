"""The expectation (16) over all masks, by a one-dimensional quadrature."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_dropmax.functional.numerics import (
    LIMIT,
    broadcast,
    clip,
    less_maximum,
    log_larger,
    log_sigmoid,
    minus,
    rows_with_nan,
    tiny,
)
from tf_dropmax.functional.objective import target_log_likelihood


class _Rule(NamedTuple):
    """The trapezoid rule for one dtype.

    The step and the margin, by which the bend lies below the first weights, decide its error.
    """

    step: float
    margin: float
    lower_mass: float  # What the integrals may hold before the first node.
    upper: float  # At the last node, the log of `s` times the smallest weight.
    finished: float  # The loop ends when the log of what is still to come is below this.

    def nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """`log s`, less its value at the bend, and the log of its slope in `v`, at every node."""
        start = np.log(self.lower_mass) + self.margin
        first = start / 2 + np.arcsinh(np.exp(start / 2) / 2)  # v - log(1 + exp(-v)) = start
        v = np.arange(first, _NARROWED + 50.0, self.step)
        return v - np.log1p(np.exp(-v)), np.log(2 - 1 / (1 + np.exp(-v)))


_NARROWED = 400.0  # The smallest logit is at most this far below the largest, without wide gaps.
_SINGLE = _Rule(step=0.64, margin=3.5, lower_mass=1e-6, upper=3.0, finished=-69.0)
_DOUBLE = _Rule(step=0.3, margin=7.0, lower_mass=1e-13, upper=3.5, finished=-650.0)


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

    The error of a probability is below 1e-5 in float32 and 2e-12 in float64. The error of its
    logarithm is below 0.02 in float32 and 1e-6 in float64, if the retain probability of the class
    is above 1e-5 and 1e-12 and the logarithm above -69 and -650. A probability too small for the
    quadrature is replaced by a lower bound, `rho_k w_k / (w_k + sum_{t != k} rho_t w_t)` from
    Jensen's inequality plus `prod_t (1 - rho_t) / T` of the masks that drop every class. So
    log-probabilities are finite and of a sensible size. If the logits of a row spread by more than
    60, the nodes leave out the wide gaps between them. If they spread by more than 400 without wide
    gaps, the lowest ones count as equal. There may then be five times as many nodes. A row does not
    depend on the other rows. The gradients are computed by quadrature too.

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
    # The loop ends with the row that has most nodes. A row with a NaN must not be that row.
    broken = rows_with_nan(*rows)
    rows = [tf.where(broken, tf.zeros_like(x), x) for x in rows]
    log_p = tf.maximum(_log_quadrature(*rows), _lower_bound(*rows))
    log_p = tf.nn.log_softmax(log_p)  # Removes the error of the sum, about 1e-7.
    log_p = tf.where(broken, tf.constant(np.nan, log_p.dtype), log_p)
    return tf.ensure_shape(tf.reshape(log_p, shape), logits.shape)


def _lower_bound(logits, retain_logits):
    """Log of a lower bound: by Jensen's inequality, and of the masks that drop every class."""
    kept = log_sigmoid(retain_logits) + target_log_likelihood(logits, retain_logits)
    none = tf.reduce_sum(log_sigmoid(-retain_logits), axis=-1, keepdims=True)
    none = tf.maximum(none, -LIMIT) - tf.math.log(tf.cast(tf.shape(logits)[-1], logits.dtype))
    return tf.maximum(kept, none) - log_larger(kept - none)


# Not `traced_once`: the converters remove the functions of loops; see `kernels`.
@tf.custom_gradient
def _log_quadrature(logits, retain_logits):
    """Log of the quadrature of eq. (16) for rows `(B, T)`.

    It is not normalised, and never below the log of the smallest float.
    """
    rule = _DOUBLE if logits.dtype == tf.float64 else _SINGLE
    positions, slopes = (tf.constant(x, logits.dtype) for x in rule.nodes())
    smallest = tiny(logits)

    log_classes = tf.math.log(tf.cast(tf.shape(logits)[-1], logits.dtype))
    # The nodes leave a wide gap out. They end where the weights above it have decayed. They go on
    # where the integrals of the classes below it hold less than `lower_mass`.
    relative, narrowed, reached, leaps = _wide_gaps(
        logits, rule.upper, log_classes - np.log(rule.lower_mass), -tf.math.log(smallest)
    )
    log_retain = log_sigmoid(retain_logits)
    log_drop = log_sigmoid(-retain_logits)
    retain, drop = tf.exp(log_retain), tf.exp(log_drop)
    # At the first node the integrals hold less than `lower_mass`, because
    # 1 - prod phi <= s sum rho w. At the last node the smallest weight has decayed. All rows have
    # the same nodes. Those after the last one of a row change nothing.
    bend = -rule.margin - tf.reduce_logsumexp(narrowed + log_retain, axis=-1, keepdims=True)
    end = tf.reduce_max(rule.upper - tf.reduce_min(narrowed, axis=-1, keepdims=True) - bend)
    nodes = tf.reduce_sum(tf.cast(positions < end, tf.int32))

    leaping = tf.reduce_any(leaps > 0)

    def after_leaps(log_s):
        made = leaps * tf.cast(log_s > reached, logits.dtype)
        return log_s + tf.reduce_sum(made, axis=-1, keepdims=True)

    def integrate(terms, count):
        """Sums `terms(y, exp(-y), 1 - exp(-y), phi, density)` over the nodes, with `y = s w`.

        `density_k` is the integrand of `p_k` as a function of `v`.
        """

        def add(index, _, *totals):
            log_s = bend + tf.gather(positions, index)
            log_s = tf.cond(leaping, lambda: after_leaps(log_s), lambda: log_s)
            y = tf.exp(tf.minimum(log_s + relative, 5.0))  # exp(-exp(5)) is 0 already.
            decay = tf.exp(minus(y))
            loss = tf.tanh(0.5 * y) * (1 + decay)  # 1 - exp(-y)
            phi = tf.maximum(drop + retain * decay, smallest)
            # Near 1, phi has lost digits that matter in a sum over many classes. There
            # 1 - phi = retain * loss corrects the logarithm.
            log_phi = tf.math.log(phi) + tf.where(phi > 0.5, (1 - phi - retain * loss) / phi, 0)
            survival = tf.reduce_sum(log_phi, axis=-1, keepdims=True)
            scale = survival + tf.gather(slopes, index)
            density = retain * y * decay * tf.exp(scale - log_phi)
            added = terms(y, decay, loss, phi, density)
            sums = [total + term for total, term in zip(totals, added, strict=True)]
            return index + 1, tf.reduce_max(survival), *sums

        def more(index, survival, *_):
            return tf.logical_and(index <= nodes, survival > rule.finished)

        zeros = [tf.zeros_like(logits)] * count
        start = (tf.zeros((), tf.int32), tf.zeros((), logits.dtype), *zeros)
        totals = tf.while_loop(more, add, start, parallel_iterations=1)[2:]
        return [rule.step * total for total in totals]

    none_retained = tf.exp(tf.reduce_sum(log_drop, axis=-1, keepdims=True) - log_classes)
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


def _wide_gaps(logits, after, before, largest):
    """What the nodes of rows `(B, T)` leave out: gaps between neighbours wider than a limit.

    The limit is `after + before`. Gaps count only in rows wider than 60.

    Returns:
        List of four tensors. The first two are the rows minus their maximum, shape `(B, T)`. In
        the first, a gap exceeds the limit by at most `largest`. In the second, it never exceeds
        it. The other two have shape `(B, G)`: the `log s` at which the nodes reach a wide gap,
        without the gaps before it, and by how much it exceeds the limit.
    """
    relative = less_maximum(logits)
    wide = tf.reduce_min(relative, axis=-1, keepdims=True) < -60.0
    classes = logits.shape[-1] or tf.shape(logits)[-1]
    least = min if isinstance(classes, int) else tf.minimum
    count = least(classes - 1, 24)  # More wide gaps do not fit between 0 and -400.

    def narrow():
        # `top_k` and not `argsort`: `vectorized_map` needs a static number of classes.
        ranked, order = tf.math.top_k(logits, classes)
        rank = tf.math.top_k(-order, classes).indices
        gaps = ranked[:, :-1] - ranked[:, 1:]

        def below(parts):
            return tf.pad(-tf.cumsum(parts, axis=-1), [[0, 0], [1, 0]])

        def as_given(ranked, otherwise):
            return tf.where(wide, tf.gather(ranked, rank, batch_dims=1), otherwise)

        narrowed = tf.maximum(below(tf.minimum(gaps, after + before)), -_NARROWED)
        leaps = tf.clip_by_value(gaps - (after + before), 0, largest)
        leaps = tf.where(wide & (narrowed[:, 1:] > -_NARROWED), leaps, 0)
        found, place = tf.math.top_k(leaps, count)
        reached = after - tf.gather(narrowed[:, :-1], place, batch_dims=1)
        parts = as_given(narrowed + below(leaps), relative), as_given(narrowed, relative)
        return tf.concat([*parts, reached, found], axis=-1)

    def keep():
        none = tf.zeros([tf.shape(logits)[0], 2 * count], logits.dtype)
        return tf.concat([relative, relative, none], axis=-1)

    # tf2onnx loses results of a condition that has several.
    joined = tf.cond(tf.reduce_any(wide), narrow, keep)
    return tf.split(joined, [classes, classes, count, count], axis=-1)
