"""Functions with a gradient of their own that leave nothing behind in TensorFlow."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import tensorflow as tf


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A `tf.custom_gradient` that is traced once for each dtype, rank and number of classes.

    In a graph, TensorFlow registers the gradient of each call of a `tf.custom_gradient` for the
    life of the process, and thereby keeps the whole graph (tensorflow#97697). The call of a
    `tf.function` registers nothing but what belongs to that function.

    Several threads may use the result and its first derivative at the same time.

    The function must have no loop and no condition. The converters to ONNX and LiteRT remove the
    functions of loops and conditions from the process, and this function is used again after that.

    Args:
        function: Function as `tf.custom_gradient` takes it. Its arguments are tensors of the same
            shape `(..., T)`, and after them scalar tensors without a gradient. Its results have the
            shape `(..., T)` or `(...)`.

    Returns:
        Function of the same arguments.

    Example:

    >>> from tf_dropmax.functional.kernels import traced_once
    >>> @traced_once
    ... def square(x):
    ...     return x * x, lambda upstream: 2 * x * upstream
    >>> square(tf.constant([[[3.0]]])).numpy().tolist()
    [[[9.0]]]
    """
    differentiable = tf.custom_gradient(function)
    lock = threading.Lock()

    @functools.cache
    def traced(*signature):
        compute = tf.function(differentiable, autograph=False).get_concrete_function(*signature)
        # TensorFlow builds the gradient when somebody first asks for it, without a lock.
        with tf.Graph().as_default():
            inputs = [tf.compat.v1.placeholder(spec.dtype, spec.shape) for spec in signature]
            tf.gradients(tf.nest.flatten(compute(*inputs)), inputs)
        return compute

    @functools.wraps(function)
    def call(*tensors: tf.Tensor) -> Any:
        # The number of rows may change without a new trace.
        shapes = [tf.TensorShape([None] * (x.shape.rank - 1)) + x.shape[-1:] for x in tensors]
        signature = map(tf.TensorSpec, shapes, [x.dtype for x in tensors])
        with lock:
            results = traced(*signature)(*tensors)
        for result in tf.nest.flatten(results):
            result.set_shape(tensors[0].shape[: result.shape.rank])
        return results

    return call
