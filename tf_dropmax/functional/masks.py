"""The masks that keep or drop classes: uniform draws, relaxed and hard Bernoulli masks."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_dropmax.functional.numerics import LIMIT, scalar, to_float

_PHILOX = tf.random.Algorithm.PHILOX.value


def uniform_draws(shape: Any, seed: Any, dtype: Any = "float32") -> tf.Tensor:
    """Uniform draws from the open interval (0, 1).

    The generator is Philox, which is fast with and without XLA.

    Args:
        shape: Integer tensor or sequence of integers, the shape of the result.
        seed: Integer tensor or pair of integers, shape `(2,)`. The same seed gives the same
            draws, other seeds give unrelated ones. XLA gives other draws than TensorFlow without
            XLA.
        dtype: `"float32"` or `"float64"`. Defaults to `"float32"`.

    Returns:
        Tensor of the given shape. The values are symmetric about 1/2, never 0 and never 1.

    Example:

    >>> u = tf_dropmax.functional.uniform_draws((2, 3), seed=(1, 2))
    >>> tuple(u.shape)
    (2, 3)
    """
    dtype = tf.as_dtype(dtype)
    # The key, and the upper half of a counter. `tf.random.stateless_uniform` would scramble the
    # seed first, which about doubles the time that XLA takes to compile the draws.
    seed = tf.bitcast(tf.cast(seed, tf.int64), tf.uint64)
    key, step = seed[:1], seed[1:]
    counter = tf.concat([tf.zeros_like(step), step], axis=0)
    draws = tf.raw_ops.StatelessRandomUniformV2(
        shape=shape, key=key, counter=counter, alg=_PHILOX, dtype=dtype
    )
    # The draws are multiples of the spacing, and 0 is one of them. Add half a spacing.
    half = (2.0**-23 if dtype == tf.float32 else 2.0**-52) / 2
    # The term `0 * first` uses the draws a second time. So XLA on a CPU computes them in a loop of
    # their own. As a part of the loop that uses them, the generator is slow: a training step with
    # 1,000 or 10,000 classes then takes 1.3 times as long.
    first = draws if draws.shape.rank == 0 else draws[..., :1]
    return draws + (0 * first + half)


def relaxed_mask_logits(
    retain_logits: Any, uniform: Any, temperature: float | tf.Tensor = 0.1
) -> tf.Tensor:
    """Logits of the relaxed Bernoulli masks, eq. (6) before its sigmoid.

    `(r + log u - log(1 - u)) / temperature`. The sigmoid of the result is the mask `z`. The
    functions of this package take mask logits instead of masks, because logits keep their digits
    where masks are close to 0 or 1.

    Args:
        retain_logits: Float tensor, shape `(..., T)`.
        uniform: Float tensor, shape `(..., T)`, draws from the open interval (0, 1).
        temperature: Positive float or scalar tensor. Defaults to 0.1.

    Returns:
        Tensor of shape `(..., T)`.

    Example:

    >>> F = tf_dropmax.functional
    >>> F.relaxed_mask_logits([0.0, 2.0], uniform=[0.5, 0.5], temperature=0.5).numpy().tolist()
    [0.0, 4.0]
    """
    retain_logits = to_float(retain_logits)
    uniform = tf.cast(uniform, retain_logits.dtype)
    temperature = scalar(temperature, retain_logits.dtype)
    noise = tf.math.log(uniform / (1 - uniform))
    return (retain_logits + noise) * (1 / temperature)


def bernoulli_mask_logits(retain_probability: Any, uniform: Any) -> tf.Tensor:
    """Logits of hard Bernoulli masks, for random DropMax.

    The sigmoid of the result is exactly 1 (retained) or 0 (dropped).

    Args:
        retain_probability: Float or float tensor that broadcasts to the shape of `uniform`.
        uniform: Float tensor, shape `(..., T)`, draws from the open interval (0, 1).

    Returns:
        Tensor of shape `(..., T)`. The gradient with respect to `retain_probability` is `None`.

    Example:

    >>> x = tf_dropmax.functional.bernoulli_mask_logits(0.4, [0.3, 0.7])
    >>> tf.sigmoid(x).numpy().tolist()
    [1.0, 0.0]
    """
    uniform = tf.convert_to_tensor(uniform)
    limit = tf.constant(LIMIT, uniform.dtype)
    return tf.where(uniform < tf.cast(retain_probability, uniform.dtype), limit, -limit)
