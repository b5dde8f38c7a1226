"""A way around what keeps `model.fit` from running under `tf.distribute.MultiWorkerMirroredStrategy` in Keras 3."""

import contextlib
import sys

import keras
import tensorflow as tf


@contextlib.contextmanager
def multi_worker(model):
    """Context manager: inside, `model.fit` and `model.evaluate` run under `tf.distribute.MultiWorkerMirroredStrategy`.

    Without it, Keras 3 (3.15.1 at least) fails there for every model, in two places. Before the first step it averages a
    batch over the workers, of which it needs no more than shapes and types, by a call that does not take the tuple that a
    batch is. After each step it averages the metrics, which are scalars, over their first axis, which they do not have. In here
    the model is built from the worker's own share of the batch, and scalars are averaged over the workers. Nothing else is
    altered; under any other strategy nothing at all is. It can go when keras-team/keras#20585 is closed and such a release is
    the oldest that this package admits.

    Each worker draws masks of its own. A worker that is lost stops the others with an error; start all of them again, each with
    `keras.callbacks.BackupAndRestore` and a folder of its own, and they go on from the last epoch.

    Args:
        model: A compiled `keras.Model`, made in the scope of the strategy.

    Yields:
        `model`.

    Raises:
        ValueError: if `model` is not a Keras model.
        RuntimeError: if this Keras has not the functions that are to be mended: then try without.

    Example:

    >>> strategy = tf.distribute.MultiWorkerMirroredStrategy()  # in every worker, with TF_CONFIG set
    >>> with strategy.scope():
    ...     model = keras.Sequential([keras.Input((20,)), tf_dropmax.DropMaxHead(10)])
    ...     model.compile("adam", tf_dropmax.DropMaxLoss())
    >>> data = tf.data.Dataset.from_tensors((np.ones((8, 20), "float32"), np.arange(8))).repeat(4)
    >>> with tf_dropmax.multi_worker(model):
    ...     history = model.fit(data, epochs=2, steps_per_epoch=2, verbose=0)
    >>> len(history.history["loss"])
    2
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a Keras model. Received: {model!r} of type {type(model).__name__}")
    trainer = sys.modules.get("keras.src.backend.tensorflow.trainer")
    if not (hasattr(model, "_maybe_symbolic_build") and hasattr(trainer, "reduce_per_replica")):
        raise RuntimeError(
            f"`multi_worker` does not know how Keras {keras.__version__} trains; `fit` may not need it any more."
        )
    strategy = model.distribute_strategy
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        yield model
        return
    reduce_per_replica = trainer.reduce_per_replica

    def build(iterator=None, data_batch=None):
        for _, _, batches in iterator or ():
            data_batch = tf.nest.map_structure(lambda x: strategy.experimental_local_results(x)[0], next(batches))
            break
        with strategy.scope():
            model._symbolic_build(data_batch=data_batch)

    def reduce_scalars(values, values_strategy, reduction):
        if values_strategy is strategy and reduction == "auto":
            return keras.tree.map_structure(lambda value: strategy.reduce("MEAN", value, axis=None), values)
        return reduce_per_replica(values, values_strategy, reduction)

    model._maybe_symbolic_build = build
    trainer.reduce_per_replica = reduce_scalars
    try:
        yield model
    finally:
        trainer.reduce_per_replica = reduce_per_replica
        del model._maybe_symbolic_build
