"""Losses on what a head returns."""

import math
import numbers

import keras
import tensorflow as tf

from tf_dropmax import functional
from tf_dropmax.checks import check_number, check_one_of, check_seed
from tf_dropmax.seeds import next_seed


class _LabelLoss(keras.losses.Loss):
    """Minus the label's entry of `scores(y_pred)`, for labels in all the forms that Keras users have them."""

    def __init__(self, ignore_class=None, label_smoothing=0.0, reduction="sum_over_batch_size", name=None, dtype=None):
        if dtype is None:
            dtype = "float64" if keras.config.floatx() == "float64" else "float32"
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"`dtype` must be 'float32' or 'float64'. Received: dtype={dtype!r}")
        if ignore_class is not None and (isinstance(ignore_class, bool) or not isinstance(ignore_class, numbers.Integral)):
            raise ValueError(f"`ignore_class` must be an int or `None`. Received: ignore_class={ignore_class!r}")
        self.ignore_class = None if ignore_class is None else int(ignore_class)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, "a float in [0, 1)", lambda x: 0 <= x < 1)

    def scores(self, y_pred):
        raise NotImplementedError

    def call(self, y_true, y_pred):
        y_true, y_pred = tf.convert_to_tensor(y_true), self.scores(tf.convert_to_tensor(y_pred))
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
        message = f"{type(self).__name__}: sparse labels must be whole numbers in [0, T), T being the number of classes."
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


@keras.saving.register_keras_serializable("tf_dropmax")
class DropMaxLoss(_LabelLoss):
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
            `None`, which means `keras.config.floatx()` if it is one of these, else `"float32"`.

    Shapes:
        y_pred `(batch, ..., T)`; y_true `(batch, ...)` or `(batch, ..., 1)` (sparse) or `(batch, ..., T)` (dense).

    Raises:
        ValueError: if an argument is not as above, or labels have another shape.
        tf.errors.InvalidArgumentError: for a sparse label outside [0, T) or not a whole number, masked positions included
            (there is `ignore_class` for labels that stand for padding). Where XLA, which cannot raise, compiles the training
            step, the loss is NaN instead; the gradient then is that of the other examples, so that weights are not lost.

    Example:

    >>> loss = tf_dropmax.DropMaxLoss()
    >>> log_probabilities = np.log([[0.5, 0.25, 0.25]]).astype("float32")
    >>> round(float(loss([0], log_probabilities)), 4)
    0.6931
    """

    def __init__(
        self, ignore_class=None, label_smoothing=0.0, reduction="sum_over_batch_size", name="dropmax_loss", dtype=None
    ):
        super().__init__(ignore_class, label_smoothing, reduction, name, dtype)

    def scores(self, y_pred):
        return y_pred


@keras.saving.register_keras_serializable("tf_dropmax")
class SparsemaxLoss(_LabelLoss):
    """The sparsemax loss (Martins & Astudillo, 2016) on plain logits; predict with `tf_dropmax.sparsemax`.

    Args:
        ignore_class, label_smoothing, reduction, dtype: As for `DropMaxLoss`.
        name: String. Defaults to `"sparsemax_loss"`.

    Shapes:
        y_pred `(batch, ..., T)`, logits; y_true as for `DropMaxLoss`. With soft labels: the mean of the classes' losses.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: as `DropMaxLoss` does.

    Example:

    >>> loss = tf_dropmax.SparsemaxLoss()
    >>> float(loss([1], [[5.0, 0.0]]))
    5.0
    """

    def __init__(
        self, ignore_class=None, label_smoothing=0.0, reduction="sum_over_batch_size", name="sparsemax_loss", dtype=None
    ):
        super().__init__(ignore_class, label_smoothing, reduction, name, dtype)

    def scores(self, y_pred):
        return functional.sparsemax_scores(y_pred)


@keras.saving.register_keras_serializable("tf_dropmax")
class SampledSoftmaxLoss(_LabelLoss):
    """Sampled softmax (Jean et al., 2014) on plain logits: the cross entropy over the target and a sample of the classes.

    For each batch a fraction of the classes is drawn, without replacement, from a distribution Q. The logits are corrected
    by the log of their probability to be drawn; the target is always in, once. Predict with the plain softmax (2).

    A loss does not know whether it is used to train: `evaluate` and `val_loss` report the sampled loss as well (and the
    sampler learns from their labels). For the negative log-likelihood use the metric
    `keras.metrics.SparseCategoricalCrossentropy(from_logits=True)`. Neither the state of the sampler nor that of its seed is
    saved with a model. With a `tf.distribute` strategy, make the loss within its scope.

    Args:
        sample_fraction: Float in (0, 1), the fraction of the classes to draw; at least one is drawn and at least one is not.
        sampler: `"uniform"`, or `"learned_unigram"`: Q is proportional to how often a label has been seen so far, plus one.
            Defaults to `"uniform"`.
        seed: `None` or int. Seeds the samples; the global seeds are not touched. Defaults to `None`.
        ignore_class, label_smoothing, reduction, dtype: As for `DropMaxLoss`.
        name: String. Defaults to `"sampled_softmax_loss"`.

    Shapes:
        y_pred `(batch, ..., T)`, logits, T at least 2; y_true as for `DropMaxLoss`.

    Raises:
        ValueError, TypeError: if an argument is not as above, or T is 1 or unknown.
        ValueError, tf.errors.InvalidArgumentError: as `DropMaxLoss` does.

    Example:

    >>> loss = tf_dropmax.SampledSoftmaxLoss(0.5, seed=1)
    >>> round(float(loss([0], np.zeros((1, 4), "float32"))), 4) in (round(np.log(2), 4), round(np.log(3), 4))
    True
    """

    def __init__(
        self,
        sample_fraction,
        sampler="uniform",
        seed=None,
        ignore_class=None,
        label_smoothing=0.0,
        reduction="sum_over_batch_size",
        name="sampled_softmax_loss",
        dtype=None,
    ):
        super().__init__(ignore_class, label_smoothing, reduction, name, dtype)
        self.sample_fraction = check_number("sample_fraction", sample_fraction, "a float in (0, 1)", lambda x: 0 < x < 1)
        self.sampler = check_one_of("sampler", sampler, ("uniform", "learned_unigram"))
        self.seed = check_seed(seed)
        self._seeds = keras.random.SeedGenerator(self.seed)
        self._counts = None

    def call(self, y_true, y_pred):
        classes = y_pred.shape[-1]
        if classes is None or classes < 2:
            raise ValueError(f"SampledSoftmaxLoss needs a known number of classes, 2 or more. Received: {classes}")
        if self.sampler == "learned_unigram":
            self._learn(tf.convert_to_tensor(y_true), tf.convert_to_tensor(y_pred))
        return super().call(y_true, y_pred)

    def _learn(self, y_true, y_pred):
        classes = y_pred.shape[-1]
        if self._counts is None:
            with tf.init_scope():
                ones = tf.ones([classes], self.dtype)
                self._counts = tf.Variable(ones, trainable=False, aggregation=tf.VariableAggregation.SUM)
        seen = y_true
        if _labels_are_sparse(y_true.shape, y_pred.shape):
            index = tf.cast(y_true, "int32")
            if self.ignore_class is not None:
                index = tf.where(tf.equal(index, self.ignore_class), -1, index)  # a row of zeros
            seen = tf.one_hot(index, classes, dtype=self.dtype)
        self._counts.assign_add(tf.reduce_sum(tf.reshape(seen, [-1, classes]), axis=0))

    def scores(self, y_pred):
        classes = y_pred.shape[-1]
        counts = tf.ones([classes], y_pred.dtype) if self._counts is None else tf.convert_to_tensor(self._counts)
        sample_size = min(max(round(self.sample_fraction * classes), 1), classes - 1)
        uniform = functional.uniform([classes], next_seed(self._seeds), y_pred.dtype)
        return functional.sampled_softmax_scores(y_pred, counts / tf.reduce_sum(counts), uniform, sample_size)

    def get_config(self):
        config = {"sample_fraction": self.sample_fraction, "sampler": self.sampler, "seed": self.seed}
        return {**super().get_config(), **config}


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
        "Labels must have the shape of the predictions without the last axis, or with 1 there (sparse), or the "
        f"shape of the predictions itself (one-hot or soft). Received: y_true.shape={labels}, y_pred.shape={predictions}"
    )
