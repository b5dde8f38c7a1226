"""Seeds of the library's own random numbers."""

import tensorflow as tf

_REPLICA_STRIDE = 668265263  # odd and unrelated to the stride between samples in `functional`


def next_seed(generator):
    """The next seed of a stream, another one on every replica of a `tf.distribute` strategy.

    Args:
        generator: A `keras.random.SeedGenerator`. Every replica holds the same state of it.

    Returns:
        Integer tensor, shape `(2,)`.
    """
    seed = tf.convert_to_tensor(generator.next())
    replica = tf.distribute.get_replica_context()
    if replica is not None and replica.num_replicas_in_sync > 1:
        seed += [tf.cast(replica.replica_id_in_sync_group, seed.dtype) * _REPLICA_STRIDE, 0]
    return seed
