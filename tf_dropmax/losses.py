"""Losses on what a head returns."""

import math
import numbers

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("tf_dropmax")
class DropMaxLoss(keras.losses.Loss):
    """The loss that goes with `DropMaxHead`: minus the label's entry of the head's output.

        loss = -y_pred[y]                  sparse labels
        loss = -sum_t y_t y_pred_t         one-hot or soft labels

    In training the head returns scores, and the batch mean of this, plus the head's `add_loss`, is the objective (15). At
    inference the head returns log-probabilities, and this is the negative log-likelihood, in nats: what `evaluate` and
    `val_loss` report.

    Args:
        ignore_class: `None` or int. Sparse labels equal to it do not count, nor are they counted in the mean (e.g. 255 or
            -1 for void pixels). The entropy term of the head does not see labels; to leave positions out there as well, give
            the model a Keras mask. Defaults to `None`.
        label_smoothing: Float in [0, 1). The label's weight is `1 - label_smoothing`, and `label_smoothing` is spread over
            all classes. Defaults to 0.0.
        reduction: As for every Keras loss. Defaults to `"sum_over_batch_size"`. The head's entropy term is a mean over the
            batch whatever this is.
        name: String. Defaults to `"dropmax_loss"`.
        dtype: `"float32"` or `"float64"`; narrower types do not hold a class index or a log-probability. Defaults to
            `None`, which means `"float32"`.

    Shapes:
        y_pred `(batch, ..., T)`; y_true `(batch, ...)` or `(batch, ..., 1)` (sparse) or `(batch, ..., T)` (dense).

    Raises:
        ValueError: if an argument is not as above, or labels have another shape.
        tf.errors.InvalidArgumentError: for a sparse label outside [0, T) or not a whole number. Where XLA, which cannot
            raise, compiles the training step, the loss is NaN instead.

    Example:

    >>> loss = tf_dropmax.DropMaxLoss()
    >>> log_probabilities = np.log([[0.5, 0.25, 0.25]]).astype("float32")
    >>> round(float(loss([0], log_probabilities)), 4)
    0.6931
    """

    def __init__(
        self, ignore_class=None, label_smoothing=0.0, reduction="sum_over_batch_size", name="dropmax_loss", dtype=None
    ):
        super().__init__(name=name, reduction=reduction, dtype="float32" if dtype is None else dtype)
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"`dtype` must be 'float32' or 'float64'. Received: dtype={dtype!r}")
        if ignore_class is not None and (isinstance(ignore_class, bool) or not isinstance(ignore_class, numbers.Integral)):
            raise ValueError(f"`ignore_class` must be an int or `None`. Received: ignore_class={ignore_class!r}")
        if not isinstance(label_smoothing, numbers.Real) or not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be a float in [0, 1). Received: label_smoothing={label_smoothing!r}")
        self.ignore_class = None if ignore_class is None else int(ignore_class)
        self.label_smoothing = float(label_smoothing)

    def call(self, y_true, y_pred):
        y_true, y_pred = tf.convert_to_tensor(y_true), tf.convert_to_tensor(y_pred)
        if not _labels_are_sparse(y_true.shape, y_pred.shape):
            if self.ignore_class is not None:
                raise ValueError(f"`ignore_class` needs sparse labels. Received: y_true.shape={tuple(y_true.shape)}")
            return -tf.reduce_sum(self._smooth(y_true, 1 / y_pred.shape[-1]) * y_pred, axis=-1)
        labels = tf.squeeze(y_true, axis=-1) if len(y_true.shape) == len(y_pred.shape) else y_true
        if self.ignore_class is None:
            return self._sparse(labels, y_pred)
        counted = tf.not_equal(labels, self.ignore_class)
        loss = tf.where(counted, self._sparse(tf.where(counted, labels, 0), y_pred), 0)
        loss._keras_mask = counted  # this is how Keras's own losses leave positions out of the mean
        return loss

    def _sparse(self, labels, y_pred):
        index = tf.cast(labels, "int32")
        classes = tf.shape(y_pred)[-1]
        valid = (index >= 0) & (index < classes) & tf.equal(tf.cast(index, labels.dtype), labels)
        message = "DropMaxLoss: sparse labels must be whole numbers in [0, T), T being the number of classes."
        check = tf.debugging.Assert(tf.reduce_all(valid), [message, "T:", classes, "Received labels:", labels])
        with tf.control_dependencies([] if check is None else [check]):
            entries = tf.gather(y_pred, tf.where(valid, index, 0), axis=-1, batch_dims=len(labels.shape))
        loss = -self._smooth(entries, tf.reduce_mean(y_pred, axis=-1))
        return tf.where(valid, loss, math.nan)  # XLA leaves the assertion out

    def _smooth(self, value, uniform):
        return (1 - self.label_smoothing) * value + self.label_smoothing * uniform if self.label_smoothing else value

    def get_config(self):
        return {
            **super().get_config(),
            "ignore_class": self.ignore_class,
            "label_smoothing": self.label_smoothing,
            "dtype": self.dtype,
        }


def _labels_are_sparse(labels, predictions):
    """Whether labels of this shape are class indices, `(...)` or `(..., 1)`, rather than `(..., T)`."""
    labels, predictions = tf.TensorShape(labels), tf.TensorShape(predictions)
    if labels.rank is not None and predictions.rank is not None and predictions.rank > 0:
        leading, classes = predictions[:-1], predictions[-1]
        if labels.is_compatible_with(leading):
            return True
        if labels.rank == predictions.rank and labels[:-1].is_compatible_with(leading):
            if labels[-1] == 1:
                return True
            if classes is not None and labels[-1] == classes:
                return False
    raise ValueError(
        "DropMaxLoss: labels must have the shape of the predictions without the last axis, or with 1 there (sparse), or the "
        f"shape of the predictions itself (one-hot or soft). Received: y_true.shape={labels}, y_pred.shape={predictions}"
    )
