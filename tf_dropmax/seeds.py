"""Seeds of the library's own random numbers."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

# Unrelated to the stride between samples in `functional.prediction`.
_REPLICA_STRIDE = 668265263


def derived_seed(seed: int | None, purpose: str) -> int | None:
    """A seed for one purpose, or `None` for no seed.

    Other seeds and other purposes give unrelated numbers.

    Args:
        seed: `None` or int.
        purpose: String, what the numbers are for.

    Returns:
        `None` or int in [0, 2**31).
    """
    if seed is None:
        return None
    (word,) = np.random.SeedSequence([abs(seed), int(seed < 0), *purpose.encode()]).generate_state(
        1
    )
    return int(word) >> 1


def next_seed(generator: keras.random.SeedGenerator) -> tf.Tensor:
    """The next seed of a stream. Under `tf.distribute`, every replica gets another seed.

    Args:
        generator: A `keras.random.SeedGenerator`. All replicas hold the same state of it.

    Returns:
        Integer tensor, shape `(2,)`.
    """
    seed = tf.convert_to_tensor(generator.next())
    replica = tf.distribute.get_replica_context()
    if replica is not None and replica.num_replicas_in_sync > 1:
        offset = tf.cast(replica.replica_id_in_sync_group, seed.dtype) * _REPLICA_STRIDE
        seed += tf.stack([offset, tf.zeros_like(offset)])
    return seed
