"""The systems that the paper compares DropMax with: sparsemax and sampled softmax.

They work on the plain logits of a `Dense` layer.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_dropmax import functional
from tf_dropmax.checks import check_fraction, check_one_of, check_optional_int
from tf_dropmax.functional.kernels import traced_once
from tf_dropmax.functional.numerics import LIMIT, relative_to_maximum, to_float
from tf_dropmax.labels import are_sparse, label_weights
from tf_dropmax.losses import LabelLoss
from tf_dropmax.seeds import derived_seed, next_seed


@keras.saving.register_keras_serializable("tf_dropmax")
class SparsemaxLoss(LabelLoss):
    """The sparsemax loss on plain logits. `tf_dropmax.sparsemax` computes the predictions.

        loss = -z_y + max_p (p . z - |p|^2 / 2) + 1/2

    The maximum is over the probability simplex. For soft labels the loss is the mean over the
    classes, weighted by the label.

    Args:
        ignore_class, label_smoothing, reduction, name, dtype: As for `DropMaxLoss`.

    Shapes:
        y_pred: `(batch, ..., T)`, logits.
        y_true: As for `DropMaxLoss`.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: As for `DropMaxLoss`.

    Example:

    >>> loss = tf_dropmax.SparsemaxLoss()
    >>> float(loss([1], [[5.0, 0.0]]))
    5.0

    References:
        Martins & Astudillo, From Softmax to Sparsemax, ICML 2016, arXiv:1602.02068.
    """

    def scores(self, y_pred: tf.Tensor) -> tf.Tensor:
        """`sparsemax_scores` of the logits."""
        return sparsemax_scores(y_pred)


@keras.saving.register_keras_serializable("tf_dropmax")
class SampledSoftmaxLoss(LabelLoss):
    """The sampled softmax loss on plain logits. The plain softmax (2) computes the predictions.

    The loss is the cross entropy over the target and a sample of the classes. For each batch, the
    loss draws a fraction of the classes without replacement from a distribution Q. It subtracts
    from each logit the log of the probability that the class is drawn. The target always takes
    part, and counts only once.

    A loss does not know whether the model is training. So `evaluate` and `val_loss` also report the
    sampled loss, and a learned sampler also counts the labels of the evaluation data. For the
    negative log-likelihood, use the metric
    `keras.metrics.SparseCategoricalCrossentropy(from_logits=True)`.
    The states of the sampler and of its seed are not saved with a model. With a `tf.distribute`
    strategy, create the loss in the scope of the strategy.

    Args:
        sample_fraction: Float in (0, 1), the fraction of the classes to draw. At least one class
            is drawn, and at least one is not.
        sampler: `"uniform"` or `"learned_unigram"`. With `"learned_unigram"`, Q is proportional
            to 1 plus the number of times that the loss has seen the label. Defaults to
            `"uniform"`.
        seed: `None` or int. Seeds the samples. Global seeds are unchanged. Defaults to `None`.
        **kwargs: Arguments of `DropMaxLoss`.

    Shapes:
        y_pred: `(batch, ..., T)`, logits. T must be known and at least 2.
        y_true: As for `DropMaxLoss`.

    Raises:
        ValueError, TypeError: If an argument is not as above, or T is unknown or 1.
        ValueError, tf.errors.InvalidArgumentError: As for `DropMaxLoss`.

    Example:

    >>> loss = tf_dropmax.SampledSoftmaxLoss(0.5, seed=1)  # draws 2 of 4 classes
    >>> value = float(loss([0], np.zeros((1, 4), "float32")))
    >>> bool(np.isclose(value, np.log([2, 3])).any())  # target and sample are 2 or 3 classes
    True

    References:
        Jean et al., On Using Very Large Target Vocabulary for Neural Machine Translation, 2014,
        arXiv:1412.2007.
    """

    def __init__(
        self,
        sample_fraction: float,
        sampler: str = "uniform",
        *,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.sample_fraction = check_fraction("sample_fraction", sample_fraction)
        self.sampler = check_one_of("sampler", sampler, ("uniform", "learned_unigram"))
        self.seed = check_optional_int("seed", seed)
        self._seeds = keras.random.SeedGenerator(derived_seed(self.seed, "samples"))
        self._counts: tf.Variable | None = None

    def call(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """The loss of every example, shape `(...)`."""
        y_true, y_pred = tf.convert_to_tensor(y_true), tf.convert_to_tensor(y_pred)
        classes = y_pred.shape[-1]
        if classes is None or classes < 2:
            raise ValueError(
                "SampledSoftmaxLoss needs a known number of classes, 2 or more. "
                f"Received: y_pred.shape={y_pred.shape}"
            )
        if self.sampler == "learned_unigram":
            self._learn(y_true, y_pred)
        return super().call(y_true, y_pred)

    def _learn(self, y_true, y_pred):
        """Counts the labels of a batch."""
        name = type(self).__name__
        if self._counts is None:
            with tf.init_scope():
                self._counts = tf.Variable(
                    tf.ones(y_pred.shape[-1:], self.dtype),
                    trainable=False,
                    aggregation=tf.VariableAggregation.SUM,
                )
        if self.ignore_class is not None and are_sparse(y_true, y_pred, name=name):
            y_true = tf.where(tf.equal(y_true, self.ignore_class), -1, y_true)  # A row of zeros.
        seen = label_weights(y_true, y_pred, name=name)
        self._counts.assign_add(tf.reduce_sum(seen, axis=list(range(seen.shape.rank - 1))))

    def scores(self, y_pred: tf.Tensor) -> tf.Tensor:
        """`sampled_softmax_scores` of the logits, with the next sample."""
        classes = y_pred.shape[-1]
        if self._counts is None:
            counts = tf.ones([classes], y_pred.dtype)
        else:
            counts = tf.convert_to_tensor(self._counts)
        sample_size = min(max(round(self.sample_fraction * classes), 1), classes - 1)
        uniform = functional.uniform_draws([classes], next_seed(self._seeds), y_pred.dtype)
        return sampled_softmax_scores(y_pred, counts / tf.reduce_sum(counts), uniform, sample_size)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "sample_fraction": self.sample_fraction,
            "sampler": self.sampler,
            "seed": self.seed,
        }


def sampled_softmax_scores(
    logits: Any, class_probabilities: Any, uniform: Any, sample_size: int
) -> tf.Tensor:
    """One score per class: its log-likelihood as the target, among itself and the sampled classes.

    The sample is drawn without replacement: class t arrives at the time `-log(u_t) / Q_t`, and
    the first `sample_size` classes that arrive are the sample. Let `s` be the time at which the
    next class arrives. Class t arrives before `s` with probability `1 - exp(-Q_t s)`, and the log
    of this probability is subtracted from its logit. A target that is also in the sample counts
    once.

    Args:
        logits: Float tensor, shape `(..., T)`.
        class_probabilities: Float tensor, shape `(T,)`, the distribution Q, positive.
        uniform: Float tensor, shape `(T,)`, draws from the open interval (0, 1).
        sample_size: Int, at least 1 and below T.

    Returns:
        Tensor of shape `(..., T)`. The values are at most 0, up to rounding.

    Example:

    >>> from tf_dropmax.baselines import sampled_softmax_scores
    >>> uniform = [0.9, 0.8, 0.2, 0.1]  # the first two classes are the sample
    >>> scores = sampled_softmax_scores([0.0] * 4, [0.25] * 4, uniform, sample_size=2)
    >>> tf.exp(scores).numpy().round(4)
    array([0.5   , 0.5   , 0.3333, 0.3333], dtype=float32)

    References:
        Jean et al., On Using Very Large Target Vocabulary for Neural Machine Translation, 2014,
        arXiv:1412.2007.
    """
    logits = to_float(logits)
    class_probabilities = tf.convert_to_tensor(class_probabilities, logits.dtype)
    arrival = -tf.math.log(tf.convert_to_tensor(uniform, logits.dtype)) / class_probabilities
    time = tf.sort(arrival)[sample_size]
    log_chance = tf.math.log(-tf.math.expm1(-class_probabilities * time))
    limit = tf.constant(LIMIT, logits.dtype)
    sample = tf.where(arrival < time, limit, -limit)
    return functional.target_log_likelihood(logits - log_chance, sample)


def sparsemax(logits: Any) -> tf.Tensor:
    """Sparsemax probabilities: the Euclidean projection of the logits onto the simplex.

    Args:
        logits: Float tensor, shape `(..., T)`.

    Returns:
        Probabilities, shape `(..., T)`. Many of them are exactly 0.

    Example:

    >>> tf_dropmax.sparsemax([0.0, 0.5, 1.0]).numpy().tolist()
    [0.0, 0.25, 0.75]

    References:
        Martins & Astudillo, From Softmax to Sparsemax, ICML 2016, arXiv:1602.02068.
    """
    return _sparsemax(to_float(logits))


@traced_once
def _sparsemax(logits):
    # Logits more than 1 below the largest have probability 0. With the cut at 2 below, the sums
    # cannot overflow.
    relative = tf.maximum(relative_to_maximum(logits), -2)
    ranked = tf.sort(relative, direction="DESCENDING", axis=-1)
    rank = tf.cast(tf.range(1, tf.shape(logits)[-1] + 1), logits.dtype)
    kept = 1 + rank * ranked > tf.cumsum(ranked, axis=-1)
    size = tf.reduce_sum(tf.cast(kept, logits.dtype), axis=-1, keepdims=True)
    total = tf.reduce_sum(tf.where(kept, ranked, 0), axis=-1, keepdims=True)
    probabilities = tf.maximum(relative - (total - 1) / size, 0)

    def gradient(upstream):
        support = tf.cast(probabilities > 0, upstream.dtype)
        mean = tf.reduce_sum(upstream * support, axis=-1, keepdims=True)
        mean /= tf.reduce_sum(support, axis=-1, keepdims=True)
        return support * (upstream - mean)

    return probabilities, gradient


def sparsemax_scores(logits: Any) -> tf.Tensor:
    """One score per class: minus the sparsemax loss, computed as if that class were the label.

    `score_k = z_k - sum_{t in support} (z_t^2 - tau^2) / 2 - 1/2`, where `z` are the logits and
    `tau` is the threshold of the projection. The gradient of `score_k` is `1_k - sparsemax(z)`.

    Args:
        logits: Float tensor, shape `(..., T)`.

    Returns:
        Tensor of shape `(..., T)`. The values are at most 0.

    Example:

    >>> from tf_dropmax.baselines import sparsemax_scores
    >>> sparsemax_scores([5.0, 0.0]).numpy().tolist()
    [0.0, -5.0]

    References:
        Martins & Astudillo, From Softmax to Sparsemax, ICML 2016, arXiv:1602.02068.
    """
    return _sparsemax_scores(to_float(logits))


@traced_once
def _sparsemax_scores(logits):
    relative, probabilities = relative_to_maximum(logits), _sparsemax(logits)
    # On the support p = z - tau, so z^2 - tau^2 = p (2 z - p).
    conjugate = probabilities * (2 * tf.maximum(relative, -2) - probabilities) / 2
    scores = relative - tf.reduce_sum(conjugate, axis=-1, keepdims=True) - 0.5

    def gradient(upstream):
        return upstream - probabilities * tf.reduce_sum(upstream, axis=-1, keepdims=True)

    return tf.minimum(scores, 0), gradient
