"""The expectation (16) over all masks, by a one-dimensional quadrature."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_dropmax.functional.numerics import (
    LOG_OF_ZERO,
    broadcast,
    log_larger,
    log_probabilities,
    log_sigmoid,
    minus,
    tiny,
    to_float,
)
from tf_dropmax.functional.objective import target_log_likelihood


class _Rule(NamedTuple):
    """The trapezoid rule for one dtype.

    The step and the margin, by which the bend lies below the first weights, decide its error.
    """

    step: float
    margin: float
    lower_mass: float  # What the integrals may hold before the first node.
    upper: float  # The integrand of a class ends where the log of `s` times its weight is this.

    def nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """`log s`, less its value at the bend, and the log of its slope in `v`, at every node.

        After the last node the slope is 1.
        """
        start = np.log(self.lower_mass) + self.margin
        first = start / 2 + np.arcsinh(np.exp(start / 2) / 2)  # v - log(1 + exp(-v)) = start
        v = np.arange(first, 40.0, self.step)
        return v - np.log1p(np.exp(-v)), np.log(2 - 1 / (1 + np.exp(-v)))


_SINGLE = _Rule(step=0.64, margin=3.5, lower_mass=1e-6, upper=3.0)
_DOUBLE = _Rule(step=0.3, margin=7.0, lower_mass=1e-13, upper=3.5)
_FINISHED = -69.0  # The loop ends when the log of what is still to come is below this.


def exact_log_probabilities(
    logits: Any, retain_logits: Any, temperature: float | tf.Tensor = 1.0
) -> tf.Tensor:
    """Log of the expectation (16) itself, over all 2^T masks.

    For independent masks and `a > 0`, `1/a = int_0^inf exp(-s a) ds`. With
    `phi_t(s) = 1 - rho_t + rho_t exp(-s w_t)` and `w = exp(o)`

        p_k = int_0^inf rho_k w_k exp(-s w_k) prod_{t != k} phi_t(s) ds + prod_t (1 - rho_t) / T

    The integrand is smooth in `log s`, where the trapezoid rule converges geometrically. For small
    `s` it is all but linear in `s`, so the nodes lie twice as far apart there: the rule is applied
    in `v`, with `log s = v - log(1 + exp(-v)) + constant`. One pass over the nodes serves all
    classes. Memory is O(B T). Time is O(Q B T), by the row with the most nodes Q. If logits
    spread by no more than 60, Q is from about 10 to 110 in float32, and at most 270 in float64.

    The error of a probability is below 1e-5 in float32 and 2e-12 in float64. The error of its
    logarithm is below 0.02 in float32 and 1e-6 in float64, if the retain probability of the class
    is above 1e-5 and 1e-12 and the logarithm is above -69. A probability too small for the
    quadrature is replaced by a lower bound, `rho_k w_k / (w_k + sum_{t != k} rho_t w_t)` from
    Jensen's inequality plus `prod_t (1 - rho_t) / T` of the masks that drop every class. So
    log-probabilities are finite and of a sensible size. A row does not depend on the other rows.
    The gradients are computed by quadrature too.

    The nodes leave out the wide gaps between the logits of a row. About 1,400 nodes in float32 and
    3,400 in float64 are the most, which suffice for 30 wide gaps. In a row with more of them and
    small retain probabilities, the lowest classes get too little.

    Args:
        logits: Float tensor, shape `(..., T)`.
        retain_logits: Float tensor, shape `(..., T)`.
        temperature: As for `softmax_log_probabilities`. Defaults to 1.0.

    Returns:
        Log-probabilities, shape `(..., T)`.

    Example:

    >>> F = tf_dropmax.functional
    >>> log_p = F.exact_log_probabilities([0.0, 0.0], [0.0, 0.0])  # (1/2 + 1 + 0 + 1/2) / 4
    >>> tf.exp(log_p).numpy().round(4).tolist()
    [0.5, 0.5]
    """
    logits, retain_logits = broadcast(to_float(logits), to_float(retain_logits))
    log_p = tf.maximum(_log_quadrature(logits, retain_logits), _lower_bound(logits, retain_logits))
    return log_probabilities(log_p, temperature)


def _lower_bound(logits, retain_logits):
    """Log of a lower bound: by Jensen's inequality, and of the masks that drop every class."""
    kept = log_sigmoid(retain_logits) + target_log_likelihood(logits, retain_logits)
    none = tf.reduce_sum(log_sigmoid(-retain_logits), axis=-1, keepdims=True)
    none -= tf.math.log(tf.cast(tf.shape(logits)[-1], logits.dtype))
    return tf.maximum(kept, none) - log_larger(kept - none)


# Not `traced_once`: the converters remove the functions of loops; see `kernels`.
@tf.custom_gradient
def _log_quadrature(logits, retain_logits):
    """Log of the quadrature of eq. (16), which is not normalised."""
    rule = _DOUBLE if logits.dtype == tf.float64 else _SINGLE
    positions, log_slopes = rule.nodes()
    steps = tf.constant(np.append(np.diff(positions), rule.step), logits.dtype)
    log_slopes = tf.constant(log_slopes, logits.dtype)
    log_classes = tf.math.log(tf.cast(tf.shape(logits)[-1], logits.dtype))
    log_drop = log_sigmoid(-retain_logits)
    retain, drop = tf.exp(log_sigmoid(retain_logits)), tf.exp(log_drop)
    # At the first node the integrals hold less than `lower_mass`, because
    # 1 - prod phi <= s sum rho w.
    most = 20 * len(positions)  # nodes
    largest = tf.reduce_max(logits, axis=-1, keepdims=True)
    weights = retain * tf.exp(logits - largest)
    weights = tf.reduce_sum(weights, axis=-1, keepdims=True) + tiny(logits)
    first = float(positions[0]) - rule.margin - tf.math.log(weights)
    begin = math.log(rule.lower_mass) - log_classes

    def integrate(terms, count):
        """Sums `terms(y, exp(-y) / phi, 1 - exp(-y), phi, share)` over the nodes, with `y = s w`.

        `rho_k share_k` is the integrand of `p_k` as a function of `v`. A row has its own `s` at a
        node, and `log_s` is the log of `s` times the weight of the logit `base`.
        """

        def add(index, base, log_s, _, *sums):
            # Two nodes in a turn, because the rest of a turn costs up to a fifth of a node.
            for _ in range(2):
                place = tf.minimum(index, len(positions) - 1)
                log_y = (logits - base) + log_s
                y = tf.exp(tf.minimum(log_y, 5.0))  # exp(-exp(5)) is 0 already.
                decay = tf.exp(minus(y))
                loss = tf.tanh(0.5 * y) * (1 + decay)  # 1 - exp(-y)
                phi = drop + retain * decay + tiny(logits)
                # Near 1, phi has lost digits that matter in a sum over many classes. There
                # 1 - phi = retain * loss corrects the logarithm.
                log_phi = tf.math.log(phi) + phi * (1 - phi - retain * loss)
                survival = tf.reduce_sum(log_phi, axis=-1, keepdims=True)
                quotient = decay / phi  # at most 1
                share = y * quotient * tf.exp(survival + tf.gather(log_slopes, place))
                added = terms(y, quotient, loss, phi, share)
                sums = tuple(total + term for total, term in zip(sums, added, strict=True))
                last, log_s = log_s, log_s + tf.gather(steps, place)
                index += 1
            # The largest logit whose integrand has not ended. If its integral has not begun, the
            # next node is where it begins.
            pending = tf.where(log_y < rule.upper, logits, LOG_OF_ZERO)
            pending = tf.reduce_max(pending, axis=-1, keepdims=True)
            going = tf.reduce_any((pending > LOG_OF_ZERO) & (survival > _FINISHED))
            going &= index < most
            leap = (pending - base) + last < begin
            log_s = tf.where(leap, begin, log_s)
            return index, tf.where(leap, pending, base), log_s, going, *sums

        def more(index, base, log_s, going, *_):
            return going

        start = tf.zeros((), tf.int32), largest, first, tf.constant(True)
        zeros = [tf.zeros_like(logits)] * count
        totals = tf.while_loop(more, add, (*start, *zeros), parallel_iterations=1)[4:]
        return [rule.step * total for total in totals]

    none_retained = tf.exp(tf.reduce_sum(log_drop, axis=-1, keepdims=True) - log_classes)
    (share,) = integrate(lambda y, quotient, loss, phi, share: [share], 1)
    p = retain * share + none_retained + tiny(logits)

    def gradient(upstream):
        upstream.set_shape(logits.shape)  # A kernel forgets the number of rows.
        scale = retain / p  # No product overflows: the sum of `scale * share` is at most 1 / step.

        def terms(y, quotient, loss, phi, share):
            pull = upstream * (scale * share)
            others = tf.reduce_sum(pull, axis=-1, keepdims=True) - pull
            kept, dropped = retain * quotient, retain * (drop / phi)
            return pull * (1 - y) - others * kept * y, pull * drop - others * loss * dropped

        by_logits, by_retain = integrate(terms, 2)
        rest = tf.reduce_sum(upstream * (none_retained / p), axis=-1, keepdims=True)
        return by_logits, by_retain - retain * rest

    return tf.math.log(p), gradient
