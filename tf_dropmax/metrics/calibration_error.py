"""The expected calibration error, and the reliability of the predictions bin by bin."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax.checks import check_positive_int
from tf_dropmax.keras_internals import get_mask, less_is_better
from tf_dropmax.labels import at_label, joint_weights
from tf_dropmax.metrics.probabilities import to_probabilities


class Reliability(NamedTuple):
    """The result of `ExpectedCalibrationError.reliability`, one entry for each bin.

    Attributes:
        weight: NumPy float64 array, the sum of the sample weights. Without sample weights it is
            the number of examples.
        confidence: NumPy float64 array, the weighted mean of the largest probability. NaN in an
            empty bin.
        accuracy: NumPy float64 array, the weighted share of right predictions. NaN in an empty
            bin.
    """

    weight: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


@less_is_better
@keras.saving.register_keras_serializable("tf_dropmax")
class ExpectedCalibrationError(keras.metrics.Metric):
    """Expected calibration error: mean of `|confidence - accuracy|` over bins of the confidence.

    The confidence is the largest probability. Bin b holds the confidences in `[b, b + 1) / bins`,
    and the last bin also holds 1. Every bin counts with the weight of its examples.

    The result does not depend on the batch size. With a `DropMaxHead`, use only the validation
    values. In training the head returns scores, not log-probabilities.

    Args:
        bins: Positive int. Defaults to 15.
        from_logits: Bool. `True`: `y_pred` are log-probabilities or any logits. `False`: they are
            probabilities. Defaults to `True`.
        name: String. Defaults to `"expected_calibration_error"`.
        dtype: As for every Keras metric. Defaults to `None`.

    Shapes:
        As for `NegativeLogLikelihood`.

    Raises:
        ValueError, TypeError, tf.errors.InvalidArgumentError: As for `NegativeLogLikelihood`.

    Example:

    >>> metric = tf_dropmax.ExpectedCalibrationError(from_logits=False)
    >>> p = [[0.9, 0.1], [0.7, 0.3]]
    >>> round(float(metric([0, 1], p)), 4)  # right with 0.9, wrong with 0.7
    0.4

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv:1706.04599.
    """

    def __init__(
        self,
        bins: int = 15,
        from_logits: bool = True,
        name: str = "expected_calibration_error",
        dtype: Any = None,
    ):
        super().__init__(name=name, dtype=dtype)
        self.bins = check_positive_int("bins", bins)
        self.from_logits = from_logits
        # For each bin the sums of weight, weight * confidence and weight * accuracy. In float64 the
        # order of the batches does not change the result by rounding.
        self._sums = self.add_variable((self.bins, 3), "zeros", dtype="float64", name="sums")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds a batch.

        Args:
            y_true: Labels.
            y_pred: Float tensor, shape `(batch, ..., T)`.
            sample_weight: `None` or float tensor, shape `(batch,)`, `(batch, ...)`, or the same
                with a last dimension of 1. Defaults to `None`.
        """
        p = to_probabilities(y_pred, self.from_logits, name=type(self).__name__)
        confidence = tf.cast(tf.reduce_max(p, axis=-1), tf.float64)
        predicted = tf.one_hot(tf.argmax(p, axis=-1), tf.shape(p)[-1], dtype=tf.float64)
        right = at_label(y_true, predicted, name=type(self).__name__)
        weight = joint_weights(confidence, sample_weight, get_mask(y_pred))
        parts = tf.stack([weight, weight * confidence, weight * right], axis=-1)
        # Rounding may lift a confidence above 1. A NaN gets into a bin, and the result is NaN.
        bins = tf.clip_by_value(tf.cast(confidence * self.bins, tf.int32), 0, self.bins - 1)
        self._sums.assign_add(tf.math.unsorted_segment_sum(parts, bins, self.bins))

    def result(self) -> tf.Tensor:
        """The calibration error of all batches, a scalar tensor; 0 before the first batch."""
        weight, confidence, right = tf.unstack(tf.convert_to_tensor(self._sums), axis=-1)
        gap = tf.reduce_sum(tf.abs(confidence - right))
        return tf.cast(tf.math.divide_no_nan(gap, tf.reduce_sum(weight)), self.dtype)

    def reliability(self) -> Reliability:
        """Weight, confidence and accuracy of every bin, as `result` uses them.

        Call it eagerly, after `update_state`, or after `evaluate` on a metric that the model was
        compiled with.

        Returns:
            A `Reliability` of three NumPy float64 arrays, shape `(bins,)`. Confidence and accuracy
            are NaN in an empty bin.

        Example:

        >>> metric = tf_dropmax.ExpectedCalibrationError(bins=2, from_logits=False)
        >>> metric.update_state([0, 1], [[0.875, 0.125], [0.625, 0.375]])
        >>> weight, confidence, accuracy = metric.reliability()
        >>> weight.tolist(), confidence.tolist(), accuracy.tolist()
        ([0.0, 2.0], [nan, 0.75], [nan, 0.5])
        """
        weight, confidence, right = self._sums.numpy().T
        with np.errstate(invalid="ignore"):
            return Reliability(weight, confidence / weight, right / weight)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "bins": self.bins, "from_logits": self.from_logits}
