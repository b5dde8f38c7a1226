"""The loss that belongs to the head, and the base class of all losses of this package."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_dropmax.checks import check_number, check_one_of, check_optional_int
from tf_dropmax.keras_internals import set_mask
from tf_dropmax.labels import are_sparse, at_label, checked

_ROUNDING = 1e-3  # The scores of the head are at most 0, up to rounding. 4e-6 was seen.


class LabelLoss(keras.losses.Loss):
    """Loss that is minus the entry of the label in `scores(y_pred)`. Arguments: `DropMaxLoss`."""

    def __init__(
        self,
        *,
        ignore_class: int | None = None,
        label_smoothing: float = 0.0,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: Any = None,
    ):
        if dtype is None:
            dtype = "float64" if keras.config.floatx() == "float64" else "float32"
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        check_one_of("dtype", self.dtype, ("float32", "float64"))
        self.ignore_class = check_optional_int("ignore_class", ignore_class)
        self.label_smoothing = check_number(
            "label_smoothing", label_smoothing, "a float in [0, 1)", lambda x: 0 <= x < 1
        )

    def scores(self, y_pred: tf.Tensor) -> tf.Tensor:
        """The scores of the classes, in the shape of `y_pred`. Here they are `y_pred`."""
        return y_pred

    def call(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """The loss of every example, shape `(...)`."""
        y_true, y_pred = tf.convert_to_tensor(y_true), tf.convert_to_tensor(y_pred)
        sparse, scores = are_sparse(y_true, y_pred, name=type(self).__name__), self.scores(y_pred)
        if self.ignore_class is None:
            return self._loss(y_true, scores)
        if not sparse:
            raise ValueError(
                f"`ignore_class` needs sparse labels. Received: y_true.shape={y_true.shape}"
            )
        counted = tf.not_equal(y_true, self.ignore_class)
        loss = self._loss(tf.where(counted, y_true, 0), scores)
        if counted.shape.rank > loss.shape.rank:
            counted = tf.squeeze(counted, axis=-1)
        loss = tf.where(counted, loss, 0)
        set_mask(loss, counted)  # The losses of Keras leave positions out in the same way.
        return loss

    def _loss(self, y_true, scores):
        value = at_label(y_true, scores, name=type(self).__name__)
        if self.label_smoothing:
            mean = tf.reduce_mean(scores, axis=-1)
            value = (1 - self.label_smoothing) * value + self.label_smoothing * mean
        return -value

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "ignore_class": self.ignore_class,
            "label_smoothing": self.label_smoothing,
            "dtype": self.dtype,
        }


@keras.saving.register_keras_serializable("tf_dropmax")
class DropMaxLoss(LabelLoss):
    """The loss for `DropMaxHead`: minus the output of the head for the label.

        loss = -y_pred[y]                  sparse labels
        loss = -sum_t y_t y_pred_t         one-hot or soft labels

    In training the head returns scores. The training loss of Keras, the mean of this loss plus the
    entropy term that the head adds by `add_loss`, is minus the objective (15). It may be negative.
    At inference the head returns log-probabilities, and this loss is the negative log-likelihood
    in nats, if there is no `label_smoothing`. `evaluate` and `val_loss` report it.

    Use this loss only with `DropMaxHead`, whose outputs are at most 0. With positive logits or
    probabilities it raises an error, because training could lower it without limit.

    Args:
        ignore_class: `None` or int. Examples with this sparse label are ignored. The mean is over
            the other examples. Typical values are 255 and -1 for void pixels. The entropy term of
            the head does not depend on labels; to ignore positions there too, use a Keras mask.
            Defaults to `None`.
        label_smoothing: Float in [0, 1). The label has the weight `1 - label_smoothing`, and the
            weight `label_smoothing` is spread evenly over all classes. Defaults to 0.0.
        reduction: As for every Keras loss. It does not apply to the entropy term of the head,
            which is always a mean over the batch. Defaults to `"sum_over_batch_size"`.
        name: String, or `None` for an automatic name. Defaults to `None`.
        dtype: `None`, `"float32"` or `"float64"`. Keras casts labels to this dtype, and a narrower
            dtype would round large class indices. `None` is `"float64"` if that is
            `keras.config.floatx()`, and `"float32"` otherwise. Defaults to `None`.

    Shapes:
        y_pred: `(batch, ..., T)`.
        y_true: `(batch, ...)` or `(batch, ..., 1)` for sparse labels, `(batch, ..., T)` for
            one-hot or soft labels. Labels are sparse if the last dimension is known to be 1 when
            the graph is traced. With an unknown last dimension they are one-hot or soft.

    Raises:
        ValueError, TypeError: If an argument is not as above, or the static shape of the labels
            does not fit.
        tf.errors.InvalidArgumentError: If the shape of the labels does not fit at run time, a
            sparse label is not a whole number in [0, T), or `y_pred` is positive at a label. Labels
            of masked positions are checked too; use `ignore_class` if a special label marks
            padding. XLA checks only the shape. With XLA the loss of such an example is NaN, and the
            gradient of the other examples is unaffected.

    Example:

    >>> loss = tf_dropmax.DropMaxLoss()
    >>> log_probabilities = np.log([[0.5, 0.25, 0.25]]).astype("float32")
    >>> round(float(loss([0], log_probabilities)), 4)
    0.6931
    """

    def _loss(self, y_true, scores):
        loss = super()._loss(y_true, scores)
        message = (
            f"{type(self).__name__} needs the output of `DropMaxHead`, which is at most 0. For "
            "`Dense(units)` use `keras.losses.SparseCategoricalCrossentropy(from_logits=True)`. "
            "After the head, remove a softmax. Received: `y_pred` at a label ="
        )
        # NaN passes. TensorFlow's optimizer of graphs would make `>=` of a negated `<`.
        valid = (loss >= -_ROUNDING) | tf.math.is_nan(loss)
        return checked(loss, valid, message, -tf.reduce_min(loss))
