"""Metrics for `compile(metrics=...)`: how far the probabilities are to be trusted, and what the head does with its masks.

Labels are sparse or dense as for `DropMaxLoss` without `ignore_class`, and checked as it checks them: give what is not to
count a valid label and the `sample_weight` 0. With soft labels every metric is the mean over
the classes, weighted by the label. `sample_weight` and Keras masks count.
"""

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax.checks import check_boolean, check_one_of, check_positive_int
from tf_dropmax.losses import DropMaxLoss

_AT_LABEL = DropMaxLoss(reduction=None, dtype="float64")
_CELLS = 2048  # of equal width in the log-odds of the confidence, from -16 to 16, where float32 ends


class _ProbabilityMean(keras.metrics.MeanMetricWrapper):
    """Mean of `function(y_true, y_pred, from_logits)`."""

    def __init__(self, function, from_logits, name, dtype):
        super().__init__(function, name, dtype, from_logits=check_boolean("from_logits", from_logits))
        self.from_logits = from_logits

    def get_config(self):
        return {"name": self.name, "dtype": self.dtype, "from_logits": self.from_logits}


@keras.saving.register_keras_serializable("tf_dropmax")
class NegativeLogLikelihood(_ProbabilityMean):
    """Mean of `-log p(label)`, in nats.

    What `DropMaxLoss` reports as `val_loss`, but without the regularisers that Keras adds to that, and for plain logits and
    probabilities too. While it trains a `DropMaxHead` returns scores, of which this makes a softmax that predicts nothing:
    of what `fit` reports only `val_...` means something.

    Args:
        from_logits: Bool. `True`: `y_pred` are log-probabilities or any logits; `False`: they are probabilities, of which
            none counts as less than the smallest normal number. Defaults to `True`.
        name: String. Defaults to `"negative_log_likelihood"`.
        dtype: As for every Keras metric.

    Shapes:
        y_pred `(batch, ..., T)`; y_true `(batch, ...)` or `(batch, ..., 1)` (sparse) or `(batch, ..., T)` (dense).

    Raises:
        ValueError, TypeError: if an argument is not as above, or labels have another shape.
        tf.errors.InvalidArgumentError: for a label outside [0, T), or probabilities outside [0, 1]; not where XLA compiles.

    Example:

    >>> metric = tf_dropmax.NegativeLogLikelihood(from_logits=False)
    >>> round(float(metric([0], [[0.5, 0.25, 0.25]])), 4)
    0.6931
    """

    def __init__(self, from_logits=True, name="negative_log_likelihood", dtype=None):
        super().__init__(_negative_log_likelihood, from_logits, name, dtype)


@keras.saving.register_keras_serializable("tf_dropmax")
class BrierScore(_ProbabilityMean):
    """Brier score: mean of `sum_t (p_t - y_t)^2`, from 0 to 2, with y the label as a one-hot row.

    As with `NegativeLogLikelihood`, in training only `val_...` means something.

    Args:
        from_logits: Bool. `True`: `y_pred` are log-probabilities or any logits; `False`: they are probabilities. Defaults to
            `True`.
        name: String. Defaults to `"brier_score"`.
        dtype: As for every Keras metric.

    Shapes:
        As for `NegativeLogLikelihood`.

    Raises:
        ValueError, TypeError: if an argument is not as above, or labels have another shape.
        tf.errors.InvalidArgumentError: for a label outside [0, T), or probabilities outside [0, 1]; not where XLA compiles.

    Example:

    >>> metric = tf_dropmax.BrierScore(from_logits=False)
    >>> float(metric([0], [[0.5, 0.25, 0.25]]))
    0.375
    """

    def __init__(self, from_logits=True, name="brier_score", dtype=None):
        super().__init__(_brier_score, from_logits, name, dtype)


@keras.saving.register_keras_serializable("tf_dropmax")
class ExpectedCalibrationError(keras.metrics.Metric):
    """Expected calibration error: mean of |confidence - accuracy| over bins of the confidence, weighted by their size.

    The confidence is the largest probability. With `binning="width"` bin b holds the confidences in `[b, b + 1) / bins`, the
    last one 1 as well, and the value does not depend on how the examples were batched. With `binning="mass"` every bin holds
    the same weight. These bins are not known before the end; so there is a histogram of 2048 cells, of width 1/64 in the
    log-odds of the confidence, and a cell in which a bin ends is divided as if its examples were all alike. That is what to
    expect of examples with the same confidence; for others it errs, for each of the `bins - 1` ends, by no more than 0.51 of
    the share of the examples that are in its cell.

    As with `NegativeLogLikelihood`, in training only `val_...` means something.

    Args:
        bins: Positive int. Defaults to 15.
        binning: `"width"` or `"mass"`. Defaults to `"width"`.
        from_logits: Bool. `True`: `y_pred` are log-probabilities or any logits; `False`: they are probabilities. Defaults to
            `True`.
        name: String. Defaults to `"expected_calibration_error"`.
        dtype: As for every Keras metric.

    Shapes:
        As for `NegativeLogLikelihood`.

    Raises:
        ValueError, TypeError: if an argument is not as above, or labels have another shape.
        tf.errors.InvalidArgumentError: for a label outside [0, T), or probabilities outside [0, 1]; not where XLA compiles.

    Example:

    >>> metric = tf_dropmax.ExpectedCalibrationError(from_logits=False)
    >>> round(float(metric([0, 1], [[0.9, 0.1], [0.7, 0.3]])), 4)  # right with 0.9, wrong with 0.7
    0.4
    """

    def __init__(self, bins=15, binning="width", from_logits=True, name="expected_calibration_error", dtype=None):
        super().__init__(name=name, dtype=dtype)
        self.bins = check_positive_int("bins", bins)
        self.binning = check_one_of("binning", binning, ("width", "mass"))
        self.from_logits = check_boolean("from_logits", from_logits)
        # Weight, confidence and accuracy, summed over the examples of a cell. In 64 bits sums of confidences are not rounded.
        self._cells = self.bins if binning == "width" else _CELLS
        self._sums = self.add_variable((self._cells, 3), "zeros", dtype="float64", name="sums")

    def update_state(self, y_true, y_pred, sample_weight=None):
        mask = getattr(y_pred, "_keras_mask", None)
        p = _probabilities(y_pred, self.from_logits)
        confidence = tf.cast(tf.reduce_max(p, axis=-1), "float64")
        right = _at_label(y_true, tf.one_hot(tf.argmax(p, axis=-1), tf.shape(p)[-1], dtype="float64"))
        weight = tf.ones_like(confidence)
        for factor in (sample_weight, mask):
            if factor is not None:
                weight *= _of_rank(tf.cast(factor, "float64"), len(confidence.shape))
        position = confidence
        if self.binning == "mass":
            position = (tf.math.log(confidence) - tf.math.log1p(-confidence)) / 32 + 0.5
        cell = tf.cast(tf.math.floor(tf.clip_by_value(position, 0, 1) * self._cells), "int32")
        cell = tf.clip_by_value(cell, 0, self._cells - 1)  # a NaN is in one of the cells, and the result is NaN
        parts = tf.stack([weight, weight * confidence, weight * right], axis=-1)
        sums = tf.math.unsorted_segment_sum(tf.reshape(parts, (-1, 3)), tf.reshape(cell, (-1,)), self._cells)
        self._sums.assign_add(sums)

    def result(self):
        weight, confidence, right = tf.unstack(tf.convert_to_tensor(self._sums), axis=-1)
        gaps, total = confidence - right, tf.reduce_sum(weight)
        if self.binning == "mass":
            edges = total * tf.linspace(tf.constant(0.0, "float64"), 1.0, self.bins + 1)[:, tf.newaxis]
            lower = tf.cumsum(weight, exclusive=True)
            below = tf.clip_by_value(tf.math.divide_no_nan(edges - lower, weight), 0, 1)  # parts of cells, (bins + 1, cells)
            gaps = tf.linalg.matvec(below[1:] - below[:-1], gaps)
        return tf.cast(tf.math.divide_no_nan(tf.reduce_sum(tf.abs(gaps)), total), self.dtype)

    def get_config(self):
        config = {"bins": self.bins, "binning": self.binning, "from_logits": self.from_logits}
        return {**super().get_config(), **config}


class _RetainMean(keras.metrics.MeanMetricWrapper):
    """Mean of one of `retain_statistics`."""

    def __init__(self, index, name, dtype):
        super().__init__(lambda y_true, y_pred: retain_statistics(y_true, y_pred)[index], name, dtype)

    def get_config(self):
        return {"name": self.name, "dtype": self.dtype}


@keras.saving.register_keras_serializable("tf_dropmax")
class TargetRetainProbability(_RetainMean):
    """Mean retain probability of the label's class.

    This and the other metrics of retain probabilities need them as an output of the model: call the head a second time, with
    `output="retain_probabilities"`. That output needs the labels too, and no loss. In training and at inference alike these
    are the probabilities (4), so that all that `fit` reports means something.

    Args:
        name: String. Defaults to `"target_retain_probability"`.
        dtype: As for every Keras metric.

    Shapes:
        y_pred `(batch, ..., T)`, retain probabilities; y_true as for `DropMaxLoss`.

    Raises:
        ValueError, TypeError: if an argument is not as above, or labels have another shape.
        tf.errors.InvalidArgumentError: for a label outside [0, T), or probabilities outside [0, 1]; not where XLA compiles.

    Example:

    >>> inputs, head = keras.Input((4,)), tf_dropmax.DropMaxHead(3)
    >>> features = keras.layers.Dense(8, "relu")(inputs)
    >>> outputs = {"classes": head(features), "retain": head(features, output="retain_probabilities")}
    >>> model = keras.Model(inputs, outputs)
    >>> model.compile(
    ...     "adam",
    ...     loss={"classes": tf_dropmax.DropMaxLoss()},
    ...     metrics={"classes": ["accuracy"], "retain": [tf_dropmax.TargetRetainProbability()]},
    ... )
    >>> x, y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
    >>> history = model.fit(x, {"classes": y, "retain": y}, verbose=0).history
    >>> sorted(history)
    ['classes_accuracy', 'loss', 'retain_target_retain_probability']
    """

    def __init__(self, name="target_retain_probability", dtype=None):
        super().__init__(0, name, dtype)


@keras.saving.register_keras_serializable("tf_dropmax")
class NonTargetRetainProbability(_RetainMean):
    """Mean retain probability of the classes that are not the label's, 0 if there is only one class.

    Args:
        name: String. Defaults to `"non_target_retain_probability"`.
        dtype: As for every Keras metric.

    Shapes:
        As for `TargetRetainProbability`, which shows how a model comes to have this output.

    Raises:
        ValueError, TypeError: if an argument is not as above, or labels have another shape.
        tf.errors.InvalidArgumentError: for a label outside [0, T), or probabilities outside [0, 1]; not where XLA compiles.

    Example:

    >>> metric = tf_dropmax.NonTargetRetainProbability()
    >>> float(metric([0], [[1.0, 0.5, 0.25]]))
    0.375
    """

    def __init__(self, name="non_target_retain_probability", dtype=None):
        super().__init__(1, name, dtype)


@keras.saving.register_keras_serializable("tf_dropmax")
class RetainedClasses(_RetainMean):
    """Mean of `sum_t rho_t`, the number of classes that a mask is expected to retain; labels make no difference.

    Args:
        name: String. Defaults to `"retained_classes"`.
        dtype: As for every Keras metric.

    Shapes:
        As for `TargetRetainProbability`, which shows how a model comes to have this output.

    Raises:
        ValueError, TypeError: if an argument is not as above, or labels have another shape.
        tf.errors.InvalidArgumentError: for a label outside [0, T), or probabilities outside [0, 1]; not where XLA compiles.

    Example:

    >>> metric = tf_dropmax.RetainedClasses()
    >>> float(metric([0], [[1.0, 0.5, 0.25]]))
    1.75
    """

    def __init__(self, name="retained_classes", dtype=None):
        super().__init__(2, name, dtype)


def retain_statistics(y_true, retain):
    """Of every example: retain probability of the label's class, mean of the others', and sum of all.

    Args:
        y_true: Labels, as for `DropMaxLoss`.
        retain: Float tensor, shape `(..., T)`, retain probabilities.

    Returns:
        Three float64 tensors, shape `(...)`.

    Example:

    >>> from tf_dropmax.metrics import retain_statistics
    >>> [values.numpy().tolist() for values in retain_statistics([1], [[1.0, 0.5, 0.25]])]
    [[0.5], [0.625], [1.75]]
    """
    retain = _checked(tf.cast(retain, "float64"), "retain probabilities (the head's `output='retain_probabilities'`)")
    target, total = _at_label(y_true, retain), tf.reduce_sum(retain, axis=-1)
    others = tf.cast(tf.maximum(tf.shape(retain)[-1] - 1, 1), "float64")
    return target, (total - target) / others, total


def _negative_log_likelihood(y_true, y_pred, from_logits):
    if from_logits:
        return -_at_label(y_true, tf.nn.log_softmax(_float(y_pred)))
    p = _probabilities(y_pred, from_logits)
    return -_at_label(y_true, tf.math.log(tf.maximum(p, np.finfo(p.dtype.as_numpy_dtype).tiny)))


def _brier_score(y_true, y_pred, from_logits):
    # In 64 bits, where the difference loses nothing.
    p = tf.cast(_probabilities(y_pred, from_logits), "float64")
    return _at_label(y_true, tf.reduce_sum(p * p, axis=-1, keepdims=True) - 2 * p + 1)


def _probabilities(y_pred, from_logits):
    return tf.nn.softmax(_float(y_pred)) if from_logits else _checked(_float(y_pred), "probabilities, as `from_logits=False`")


def _checked(p, expected):
    """`p`, if none of it lies outside [0, 1]. A NaN passes, and XLA leaves the assertion out."""
    wrong = tf.reduce_any((p < 0) | (p > 1.001))
    check = tf.debugging.Assert(tf.logical_not(wrong), [f"Expected `y_pred` in [0, 1], {expected}. Received:", p])
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(p)


def _float(x):
    x = tf.convert_to_tensor(x)
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


def _at_label(y_true, values):
    """The label's entry of `values`, shape `(...)`; with soft labels the mean over them."""
    return -_AT_LABEL(y_true, values)


def _of_rank(x, rank):
    """Weights `(batch,)`, `(batch, 1)`, ... with as many axes as what they weigh."""
    if len(x.shape) > rank:
        return tf.squeeze(x, axis=-1)
    return tf.reshape(x, tf.concat([tf.shape(x), tf.ones([rank - len(x.shape)], "int32")], axis=0))
