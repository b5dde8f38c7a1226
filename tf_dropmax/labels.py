"""The forms of labels, and the label's entry of a tensor of values.

Sparse labels are class indices, shape `(...)` or `(..., 1)`. Dense labels are one-hot or soft
rows, shape `(..., T)`. Static dimensions may be unknown: where the static shapes do not decide
whether labels fit, the shapes are compared at run time.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def at_label(y_true: Any, values: Any, *, name: str) -> tf.Tensor:
    """The entry of the label in `values`.

    For dense labels, it is the sum over classes, weighted by the label.

    Args:
        y_true: Labels, shape `(...)`, `(..., 1)` or `(..., T)`.
        values: Float tensor, shape `(..., T)`.
        name: String, the caller that error messages name.

    Returns:
        Tensor of shape `(...)` and the dtype of `values`. If XLA compiles, an invalid sparse
        label gives NaN. The gradient of the other examples is unaffected.

    Raises:
        ValueError: If the static shapes do not fit.
        tf.errors.InvalidArgumentError: If the shapes do not fit at run time, or a sparse label is
            not a whole number in [0, T). XLA ignores the second check.

    Example:

    >>> from tf_dropmax.labels import at_label
    >>> at_label([2, 0], [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], name="example").numpy().tolist()
    [2.0, 3.0]
    >>> at_label([[0.5, 0.5]], [[2.0, 4.0]], name="example").numpy().tolist()
    [3.0]
    """
    y_true, values = tf.convert_to_tensor(y_true), tf.convert_to_tensor(values)
    if not are_sparse(y_true, values, name=name):
        return tf.reduce_sum(label_weights(y_true, values, name=name) * values, axis=-1)
    labels = tf.cast(_indices(y_true, values, name), tf.float64)
    below = labels < tf.cast(tf.shape(values)[-1], tf.float64)
    valid = (labels >= 0) & below & tf.equal(labels, tf.floor(labels))
    index = tf.cast(tf.where(valid, labels, 0), tf.int32)
    entries = tf.gather(values, index, axis=-1, batch_dims=labels.shape.rank)
    classes = values.shape[-1] or "T"
    message = f"{name}: sparse labels must be whole numbers in [0, {classes}). Received: from"
    return checked(entries, valid, message, tf.reduce_min(labels), "to", tf.reduce_max(labels))


def are_sparse(y_true: tf.Tensor, values: tf.Tensor, *, name: str) -> bool:
    """Whether labels are sparse, decided by the static shapes.

    Labels of the rank of `values` are sparse if their last dimension is known to be 1. Otherwise
    they are dense.

    Args:
        y_true, values, name: As for `at_label`. Both are tensors.

    Returns:
        Bool.

    Raises:
        ValueError: If the shapes do not fit, or a rank is unknown.

    Example:

    >>> from tf_dropmax.labels import are_sparse
    >>> are_sparse(tf.zeros((2, 1)), tf.zeros((2, 3)), name="example")
    True
    """
    labels, predictions = y_true.shape, values.shape
    if labels.rank is not None and predictions.rank:
        leading, fits = predictions[:-1], labels.is_compatible_with
        sparse = fits(leading) or (fits(leading.concatenate([1])) and labels[-1] == 1)
        if sparse or fits(predictions):
            return sparse
    received = f"Received: y_true.shape={labels}, y_pred.shape={predictions}"
    if labels.rank is None:
        received += ". If earlier labels were of another rank, call `compile` again"
    raise ValueError(f"{_shape_message(name)} {received}")


def label_weights(y_true: tf.Tensor, values: tf.Tensor, *, name: str) -> tf.Tensor:
    """Labels as rows: one-hot for sparse labels, unchanged for dense labels.

    Args:
        y_true, values, name: As for `at_label`. Both are tensors.

    Returns:
        Tensor of the shape and dtype of `values`. A sparse label is converted to int32, without
        the check of `at_label`. If it is then not in [0, T), its row is zeros.

    Raises:
        ValueError: If the static shapes do not fit.
        tf.errors.InvalidArgumentError: If the shapes do not fit at run time.

    Example:

    >>> from tf_dropmax.labels import label_weights
    >>> label_weights(tf.constant([1]), tf.zeros((1, 3)), name="example").numpy().tolist()
    [[0.0, 1.0, 0.0]]
    """
    if are_sparse(y_true, values, name=name):
        labels = _indices(y_true, values, name)
        return tf.one_hot(tf.cast(labels, tf.int32), tf.shape(values)[-1], dtype=values.dtype)
    return tf.cast(_same_shape(y_true, values, name), values.dtype)


def _indices(y_true, values, name):
    """Sparse labels without the last dimension of size 1."""
    if y_true.shape.rank < values.shape.rank:
        return _same_shape(y_true, values[..., 0], name)
    return tf.squeeze(_same_shape(y_true, values[..., :1], name), axis=-1)


def _same_shape(labels, values, name):
    """`labels`, after a check that their shape at run time is that of `values`."""
    if labels.shape.is_fully_defined() and values.shape.is_fully_defined():
        return labels
    shapes = tf.shape(labels), tf.shape(values)
    received = f"{_shape_message(name)} Received: y_true.shape =", shapes[0], "for", shapes[1]
    checks = _assertion(tf.reduce_all(tf.equal(*shapes)), received)
    # XLA drops the assertion, but it compares the shapes of summands. These have no elements.
    empty = [tf.cast(x[tf.newaxis][:0], tf.int32) for x in (labels, values)]
    checks.append(tf.add_n(empty, name="labels_must_have_the_shape_of_the_predictions"))
    with tf.control_dependencies(checks):
        return tf.identity(labels)


def joint_weights(values: tf.Tensor, *factors: Any) -> tf.Tensor:
    """The product of sample weights and masks of examples or positions.

    Args:
        values: Float tensor, shape `(batch, ...)`.
        *factors: `None`, or tensors or arrays of shape `(batch,)`, `(batch, ...)`, or the same with
            a last dimension of 1.

    Returns:
        Tensor of the shape and dtype of `values`. It is 1 if all factors are `None`.

    Example:

    >>> from tf_dropmax.labels import joint_weights
    >>> joint_weights(tf.zeros((2, 3)), [0.5, 2.0], None).numpy().tolist()
    [[0.5, 0.5, 0.5], [2.0, 2.0, 2.0]]
    """
    weight = tf.ones_like(values)
    for factor in factors:
        if factor is not None:
            # Shapes `(batch,)`, `(batch, 1)`, ... in the rank of the values.
            shape = tf.concat([tf.shape(factor), tf.ones_like(tf.shape(values))], axis=0)
            weight *= tf.reshape(tf.cast(factor, values.dtype), shape[: values.shape.rank])
    return weight


def checked(values: tf.Tensor, valid: tf.Tensor, *message: Any) -> tf.Tensor:
    """`values`, after a check at run time that all of them are valid.

    Args:
        values: Float tensor.
        valid: Bool tensor of the shape of `values`.
        *message: Strings and tensors that together are the error message.

    Returns:
        Tensor of the shape of `values`. If XLA compiles, an invalid value becomes NaN and has no
        gradient.

    Raises:
        tf.errors.InvalidArgumentError: If a value is not valid. XLA ignores this check.

    Example:

    >>> from tf_dropmax.labels import checked
    >>> x = tf.constant([1.0, -1.0])
    >>> checked(x, x > -2, "Every value must exceed -2. Received:", x).numpy().tolist()
    [1.0, -1.0]
    """
    with tf.control_dependencies(_assertion(tf.reduce_all(valid), message)):
        # Not a constant NaN, which `tf.debugging.enable_check_numerics` would refuse.
        return tf.where(valid, values, tf.sqrt(tf.cast(valid, values.dtype) - 1))


def _assertion(condition, message):
    """A list of the assertion. In eager mode the list is empty: the check is already done."""
    if not tf.executing_eagerly():
        return [tf.raw_ops.Assert(condition=condition, data=list(message))]
    if not condition:
        text = " ".join(str(x.numpy() if tf.is_tensor(x) else x) for x in message)
        raise tf.errors.InvalidArgumentError(None, None, text)
    return []


def _shape_message(name):
    return (
        f"{name}: Labels must have the shape of the predictions (one-hot or soft), or that shape "
        "without the last dimension, or with a static last dimension of 1 (sparse)."
    )
