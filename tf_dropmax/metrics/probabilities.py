"""Proper scores of predicted probabilities: the likelihood of the label, and the Brier score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tf_dropmax.functional.numerics import tiny, to_float
from tf_dropmax.keras_internals import get_mask, less_is_better
from tf_dropmax.labels import at_label, checked, joint_weights

_TOLERANCE = 1e-3  # Rounding, also in bfloat16, may lift a probability above 1.


class LabelMean(keras.metrics.Mean):
    """Mean of `function(y_true, y_pred, **settings)` over the examples."""

    def __init__(self, function: Callable, name: str, dtype: Any, **settings: Any):
        super().__init__(name, dtype)
        self._function, self._settings = function, settings

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        values = self._function(y_true, y_pred, **self._settings)
        super().update_state(values, joint_weights(values, sample_weight, get_mask(y_pred)))

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, **self._settings}


@less_is_better
@keras.saving.register_keras_serializable("tf_dropmax")
class NegativeLogLikelihood(LabelMean):
    """Mean of `-log p(label)`, in nats.

    Without `label_smoothing`, `ignore_class` and sample weights, `val_loss` of `DropMaxLoss` is
    this value plus the penalties of the regularizers. This metric also takes plain logits and
    probabilities. With a `DropMaxHead`, use only the validation values. In training the head
    returns scores, not log-probabilities.

    Args:
        from_logits: Bool. `True`: `y_pred` are log-probabilities or any logits. `False`: they are
            probabilities, and a probability below the smallest normal number (1.2e-38 in
            float32) counts as that number. Defaults to `True`.
        name: String. Defaults to `"negative_log_likelihood"`.
        dtype: As for every Keras metric. Defaults to `None`.

    Shapes:
        y_pred: `(batch, ..., T)`.
        y_true: `(batch, ...)` or `(batch, ..., 1)` for sparse labels, `(batch, ..., T)` for
            one-hot or soft labels.

    Raises:
        ValueError, TypeError: If an argument is not as above, or the static shape of the labels
            does not fit.
        tf.errors.InvalidArgumentError: If the shape of the labels does not fit at run time, a
            sparse label is not a whole number in [0, T), or a probability is outside [0, 1]. XLA
            checks only the shape; what is invalid then gives NaN.

    Example:

    >>> metric = tf_dropmax.NegativeLogLikelihood(from_logits=False)
    >>> round(float(metric([0], [[0.5, 0.25, 0.25]])), 4)
    0.6931
    """

    def __init__(
        self, from_logits: bool = True, name: str = "negative_log_likelihood", dtype: Any = None
    ):
        super().__init__(_negative_log_likelihood, name, dtype, from_logits=from_logits)


@less_is_better
@keras.saving.register_keras_serializable("tf_dropmax")
class BrierScore(LabelMean):
    """Brier score: mean of `sum_t (p_t - y_t)^2`, where `y` is the one-hot label.

    The score is between 0 and 2. With a `DropMaxHead`, use only the validation values. In training
    the head returns scores, not log-probabilities.

    Args:
        from_logits: Bool. `True`: `y_pred` are log-probabilities or any logits. `False`: they are
            probabilities. Defaults to `True`.
        name: String. Defaults to `"brier_score"`.
        dtype: As for every Keras metric. Defaults to `None`.

    Shapes:
        As for `NegativeLogLikelihood`.

    Raises:
        ValueError, TypeError, tf.errors.InvalidArgumentError: As for `NegativeLogLikelihood`.

    Example:

    >>> metric = tf_dropmax.BrierScore(from_logits=False)
    >>> float(metric([0], [[0.5, 0.25, 0.25]]))
    0.375

    References:
        Brier, Verification of Forecasts Expressed in Terms of Probability, 1950.
    """

    def __init__(self, from_logits: bool = True, name: str = "brier_score", dtype: Any = None):
        super().__init__(_brier_score, name, dtype, from_logits=from_logits)


def _negative_log_likelihood(y_true, y_pred, from_logits):
    name = "NegativeLogLikelihood"
    if from_logits:
        log_p = tf.nn.log_softmax(to_float(y_pred))
    else:
        p = to_probabilities(y_pred, from_logits, name=name)
        log_p = tf.math.log(tf.maximum(p, tiny(p)))
    return -at_label(y_true, log_p, name=name)


def _brier_score(y_true, y_pred, from_logits):
    name = "BrierScore"
    # In float64 nothing cancels in the difference.
    p = tf.cast(to_probabilities(y_pred, from_logits, name=name), tf.float64)
    # The score of every class if it were the label.
    scores = tf.reduce_sum(p * p, axis=-1, keepdims=True) - 2 * p + 1
    return at_label(y_true, scores, name=name)


def to_probabilities(y_pred: Any, from_logits: bool, *, name: str) -> tf.Tensor:
    """Probabilities of the classes.

    Args:
        y_pred: Float tensor, shape `(..., T)`.
        from_logits: Bool. `True`: `y_pred` are logits. `False`: they are probabilities.
        name: String, the caller that error messages name.

    Returns:
        Float tensor of the shape of `y_pred`.

    Raises:
        tf.errors.InvalidArgumentError: If `from_logits` is false and a value is outside [0, 1]. A
            NaN does not raise. XLA does not raise, but turns the value into NaN.
    """
    p = to_float(y_pred)
    if from_logits:
        return tf.nn.softmax(p)
    message = f"{name}: `y_pred` must be in [0, 1], as probabilities are. Received: from"
    valid = ~((p < 0) | (p > 1 + _TOLERANCE))
    return checked(p, valid, message, tf.reduce_min(p), "to", tf.reduce_max(p))
