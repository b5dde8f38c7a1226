"""What the other modules of `functional` share: dtypes, safe ranges, broadcasting."""

from __future__ import annotations

import functools

import numpy as np
import tensorflow as tf

from tf_dropmax.functional.kernels import traced_once

LIMIT = 1e37  # Larger magnitudes are clipped. The sum of three still fits into float32.


def to_float(x) -> tf.Tensor:
    """`x` as a float64 tensor if it is float64, as a float32 tensor otherwise."""
    x = tf.convert_to_tensor(x)
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


def clip(x) -> tf.Tensor:
    """`x` as a float tensor within the limits. Infinities become NaN."""
    x = to_float(x)
    clipped = tf.clip_by_value(x, -LIMIT, LIMIT)
    return tf.where(tf.math.is_finite(x), clipped, tf.constant(np.nan, x.dtype))


def scalar(value, dtype) -> tf.Tensor:
    """A number as a tensor. A Python float keeps all its digits in float64."""
    return tf.cast(tf.convert_to_tensor(value, dtype_hint=dtype), dtype)


def minus(x: tf.Tensor) -> tf.Tensor:
    """`-x`, for the argument of another elementwise function.

    TensorFlow fuses `exp(-x)` and the like into one operation, which is slow for tensors of about
    10,000 entries. It does not fuse a product.
    """
    return -1.0 * x


def relative_to_maximum(logits: tf.Tensor) -> tf.Tensor:
    """Logits minus the maximum of their row.

    The softmax stays the same, and large logits do not swallow what is added to them. The
    difference of two finite logits may be minus infinity.
    """
    return logits - tf.reduce_max(logits, axis=-1, keepdims=True)


def less_maximum(logits: tf.Tensor) -> tf.Tensor:
    """`relative_to_maximum`, no less than `-LIMIT`."""
    return tf.maximum(relative_to_maximum(logits), -LIMIT)


def log_sigmoid(x) -> tf.Tensor:
    """`log(sigmoid(x))`, finite for every finite `x` of shape `(..., T)`."""
    return _log_sigmoid(to_float(x))


@traced_once
def _log_sigmoid(x):
    value = tf.maximum(tf.minimum(x, 0), -LIMIT) + log_larger(x)
    return value, lambda upstream: upstream * tf.sigmoid(minus(x))


def linear_part(start: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """`start + min(x, 0)`, no less than `-LIMIT`. `start` is at most 0."""
    return tf.maximum(start + tf.minimum(x, 0), -LIMIT)


def log_larger(x: tf.Tensor) -> tf.Tensor:
    """`log(sigmoid(|x|))`. Plus `min(x, 0)` this is `log(sigmoid(x))`."""
    # Not `log1p`, which ONNX lacks. The difference is below the rounding of the sum.
    return minus(tf.math.log(1 + tf.exp(minus(tf.abs(x)))))


def tiny(x: tf.Tensor) -> tf.Tensor:
    """The smallest positive normal number of the dtype of `x`."""
    return tf.constant(np.finfo(x.dtype.as_numpy_dtype).tiny, x.dtype)


def rows_with_nan(*arguments: tf.Tensor) -> tf.Tensor:
    """Whether a row of any argument has a NaN, shape `(..., 1)`."""
    return tf.reduce_any(tf.math.is_nan(tf.add_n(arguments)), axis=-1, keepdims=True)


def broadcast(*arguments: tf.Tensor) -> list[tf.Tensor]:
    """The arguments in their common shape. Arguments that already have it are not copied."""
    shapes = [argument.shape for argument in arguments]
    if shapes[0].is_fully_defined() and shapes.count(shapes[0]) == len(shapes):
        return list(arguments)
    same_rank = shapes[0].rank is not None and all(s.rank == shapes[0].rank for s in shapes)

    def join_same_rank(one, other):
        return tf.where(one == 1, other, one)

    # ONNX has no counterpart of `broadcast_dynamic_shape`.
    join = join_same_rank if same_rank else tf.broadcast_dynamic_shape
    common = functools.reduce(join, [tf.shape(argument) for argument in arguments])
    static = functools.reduce(tf.broadcast_static_shape, shapes)
    return [tf.ensure_shape(tf.broadcast_to(argument, common), static) for argument in arguments]
