"""What the masks of a head do: retain probabilities of the label and of the other classes."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tf_dropmax.labels import at_label
from tf_dropmax.metrics.probabilities import LabelMean, to_probabilities


def retain_statistics(
    y_true: Any, retain: Any, *, name: str = "retain_statistics"
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Retain probability of the label's class, the mean of the other classes, and the sum of all.

    Args:
        y_true: Labels, in the shapes that `DropMaxLoss` takes.
        retain: Float tensor, shape `(..., T)`, retain probabilities.
        name: String, the caller that error messages name. Defaults to `"retain_statistics"`.

    Returns:
        Tuple of three float64 tensors, shape `(...)`. The second is 0 if there is only one class.

    Raises:
        ValueError: If the static shape of the labels does not fit.
        tf.errors.InvalidArgumentError: If the shape of the labels does not fit at run time, a
            sparse label is not a whole number in [0, T), or a retain probability is outside
            [0, 1]. XLA checks only the shape; what is invalid then gives NaN.

    Example:

    >>> from tf_dropmax.metrics import retain_statistics
    >>> [values.numpy().tolist() for values in retain_statistics([1], [[1.0, 0.5, 0.25]])]
    [[0.5], [0.625], [1.75]]
    """
    retain = to_probabilities(tf.cast(retain, tf.float64), from_logits=False, name=name)
    target, total = at_label(y_true, retain, name=name), tf.reduce_sum(retain, axis=-1)
    others = tf.cast(tf.shape(retain)[-1] - 1, tf.float64)
    return target, tf.math.divide_no_nan(total - target, others), total


class _RetainMean(LabelMean):
    """Mean of one of the `retain_statistics` over the examples."""

    def __init__(self, index: int, name: str, dtype: Any):
        def statistic(y_true, y_pred):
            return retain_statistics(y_true, y_pred, name=type(self).__name__)[index]

        super().__init__(statistic, name, dtype)


@keras.saving.register_keras_serializable("tf_dropmax")
class TargetRetainProbability(_RetainMean):
    """Mean retain probability of the label's class.

    The metrics of retain probabilities need them as an output of the model. Call the head a second
    time, with `output="retain_probabilities"`. Pass the labels for this output too. It needs no
    loss. The head returns the probabilities (4) in training and at inference, so training and
    validation values both have a meaning.

    Args:
        name: String. Defaults to `"target_retain_probability"`.
        dtype: As for every Keras metric. Defaults to `None`.

    Shapes:
        y_pred: `(batch, ..., T)`, retain probabilities.
        y_true: As for `DropMaxLoss`.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: As for `metrics.retain_statistics`.

    Example:

    >>> inputs, head = keras.Input((4,)), tf_dropmax.DropMaxHead(3)
    >>> features = keras.layers.Dense(8, "relu")(inputs)
    >>> retain = head(features, output="retain_probabilities")
    >>> model = keras.Model(inputs, {"classes": head(features), "retain": retain})
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

    def __init__(self, name: str = "target_retain_probability", dtype: Any = None):
        super().__init__(0, name, dtype)


@keras.saving.register_keras_serializable("tf_dropmax")
class NonTargetRetainProbability(_RetainMean):
    """Mean retain probability of the classes that are not the label's.

    It is 0 if there is only one class. `TargetRetainProbability` shows a model with this output.

    Args:
        name: String. Defaults to `"non_target_retain_probability"`.
        dtype: As for every Keras metric. Defaults to `None`.

    Shapes:
        As for `TargetRetainProbability`.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: As for `metrics.retain_statistics`.

    Example:

    >>> metric = tf_dropmax.NonTargetRetainProbability()
    >>> float(metric([0], [[1.0, 0.5, 0.25]]))
    0.375
    """

    def __init__(self, name: str = "non_target_retain_probability", dtype: Any = None):
        super().__init__(1, name, dtype)


@keras.saving.register_keras_serializable("tf_dropmax")
class RetainedClasses(_RetainMean):
    """Mean of `sum_t rho_t`, the expected number of classes that a mask keeps.

    The value does not depend on the labels. `TargetRetainProbability` shows a model with this
    output.

    Args:
        name: String. Defaults to `"retained_classes"`.
        dtype: As for every Keras metric. Defaults to `None`.

    Shapes:
        As for `TargetRetainProbability`.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: As for `metrics.retain_statistics`.

    Example:

    >>> metric = tf_dropmax.RetainedClasses()
    >>> float(metric([0], [[1.0, 0.5, 0.25]]))
    1.75
    """

    def __init__(self, name: str = "retained_classes", dtype: Any = None):
        super().__init__(2, name, dtype)
