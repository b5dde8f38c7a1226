"""Functions with a gradient of their own that leave nothing behind in TensorFlow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A `tf.custom_gradient` that is traced once for each dtype and number of classes.

    In a graph, TensorFlow registers the gradient of each call of a `tf.custom_gradient` for the
    life of the process, and thereby keeps the whole graph (tensorflow#97697). The call of a
    `tf.function` registers nothing but what belongs to that function.

    The function must have no loop and no condition. The converters to ONNX and LiteRT remove the
    functions of loops and conditions from the process, and this function is used again after that.

    Args:
        function: Function of tensors of shape `(B, T)`, and of others after them, as
            `tf.custom_gradient` takes it. Its results have the shape `(B, T)` or `(B,)`.

    Returns:
        Function of tensors that all have the same shape `(..., T)`. The keyword argument
        `constants` is a tuple of tensors that have no gradient. Their shape is not changed.

    Example:

    >>> from tf_dropmax.functional.kernels import traced_once
    >>> @traced_once
    ... def square(x):
    ...     return x * x, lambda upstream: 2 * x * upstream
    >>> square(tf.constant([[[3.0]]])).numpy().tolist()
    [[[9.0]]]
    """
    differentiable = tf.custom_gradient(function)

    @functools.cache
    def traced(*signature):
        # An object of its own for each signature: TensorFlow counts the traces of an object, and
        # warns after five.
        compute = functools.partial(differentiable)
        return tf.function(compute, input_signature=signature, autograph=False)

    @functools.wraps(function)
    def call(*tensors: tf.Tensor, constants: tuple[tf.Tensor, ...] = ()) -> Any:
        static, classes = tensors[0].shape, tensors[0].shape[-1]
        shape = None if static.rank == 2 else tf.shape(tensors[0])
        if shape is not None:
            rows = (-1, shape[-1] if classes is None else classes)
            tensors = tuple(tf.reshape(tensor, rows) for tensor in tensors)
        arguments = (*tensors, *constants)
        # The number of rows may change without a new trace.
        shapes = [[None, *x.shape[1:]] if x.shape.rank else x.shape for x in arguments]
        signature = map(tf.TensorSpec, shapes, [x.dtype for x in arguments])

        def restored(result):
            whole = result.shape.rank == 2
            if shape is not None:
                result = tf.reshape(result, shape if whole else shape[:-1])
            result.set_shape(static if whole else static[:-1])
            return result

        return tf.nest.map_structure(restored, traced(*signature)(*arguments))

    return call
