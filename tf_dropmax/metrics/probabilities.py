"""Predictions as probabilities, for the metrics that take either these or logits."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_dropmax.functional.numerics import to_float

_TOLERANCE = 1e-3  # Rounding, also in bfloat16, may lift a probability above 1.


def to_probabilities(y_pred: Any, from_logits: bool, *, name: str) -> tf.Tensor:
    """Probabilities of the classes.

    Args:
        y_pred: Float tensor, shape `(..., T)`.
        from_logits: Bool. `True`: `y_pred` are logits. `False`: they are probabilities.
        name: String, the caller that error messages name.

    Returns:
        Float tensor of the shape of `y_pred`.

    Raises:
        tf.errors.InvalidArgumentError: As for `checked_probabilities`.
    """
    y_pred = to_float(y_pred)
    if from_logits:
        return tf.nn.softmax(y_pred)
    return checked_probabilities(y_pred, "probabilities, because `from_logits=False`", name=name)


def checked_probabilities(p: tf.Tensor, expected: str, *, name: str) -> tf.Tensor:
    """`p`, unchanged.

    Args:
        p: Float tensor.
        expected: String, what the error message says that `y_pred` must be.
        name: String, the caller that error messages name.

    Returns:
        `p`.

    Raises:
        tf.errors.InvalidArgumentError: If a value is outside [0, 1]. A NaN does not raise. XLA
            ignores the check.
    """
    right = tf.logical_not(tf.reduce_any((p < 0) | (p > 1 + _TOLERANCE)))
    message = f"{name}: `y_pred` must be in [0, 1]: {expected}. Received: y_pred="
    check = tf.debugging.Assert(right, [message, p])
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(p)
