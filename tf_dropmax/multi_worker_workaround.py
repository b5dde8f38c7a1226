"""Work-around: `fit` of Keras 3 fails under `tf.distribute.MultiWorkerMirroredStrategy`.

Remove this file when https://github.com/keras-team/keras/issues/20585 is closed and the oldest
Keras that `setup.cfg` allows has the fix. `fit` then works without `multi_worker`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf


@contextlib.contextmanager
def multi_worker(model: keras.Model) -> Iterator[keras.Model]:
    """Context manager in which `fit` and `evaluate` run under `MultiWorkerMirroredStrategy`.

    It works around two faults of Keras 3, which affect every model (Keras 3.15.1):

    - Before the first step, Keras tries to average a batch over the workers, and the function that
      it calls does not accept a tuple. Keras needs only the shapes and dtypes of the batch. In this
      context manager it takes them from the worker's own part of the batch.
    - After each step, Keras tries to average the metrics over their first axis, but they are
      scalars. In this context manager it averages them over the workers.

    Nothing else changes. Under other strategies nothing changes at all.

    Every worker draws its own masks. If a worker is lost, the others stop with an error. To
    continue from the last epoch, start all workers again, each with
    `keras.callbacks.BackupAndRestore` and its own folder.

    Args:
        model: A compiled `keras.Model` that was made in the scope of the strategy.

    Yields:
        `model`.

    Raises:
        ValueError: If `model` is not a Keras model.
        RuntimeError: If this version of Keras does not have the functions that are replaced. Try
            `fit` without `multi_worker`.

    Example:

    >>> strategy = tf.distribute.MultiWorkerMirroredStrategy()  # in every worker, with TF_CONFIG
    >>> with strategy.scope():
    ...     model = keras.Sequential([keras.Input((20,)), tf_dropmax.DropMaxHead(10)])
    ...     model.compile("adam", tf_dropmax.DropMaxLoss())
    >>> data = tf.data.Dataset.from_tensors((np.ones((8, 20), "float32"), np.arange(8))).repeat(4)
    >>> with tf_dropmax.multi_worker(model):
    ...     history = model.fit(data, epochs=2, steps_per_epoch=2, shuffle=False, verbose=0)
    >>> len(history.history["loss"])
    2
    """
    if not isinstance(model, keras.Model):
        received = f"{model!r} of type {type(model).__name__}"
        raise ValueError(f"Expected a Keras model. Received: {received}")
    trainer: Any = sys.modules.get("keras.src.backend.tensorflow.trainer")
    if not (hasattr(model, "_maybe_symbolic_build") and hasattr(trainer, "reduce_per_replica")):
        raise RuntimeError(
            f"`multi_worker` does not support Keras {keras.__version__}. "
            "Try `fit` without `multi_worker`."
        )
    strategy = model.distribute_strategy
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        yield model
        return
    reduce_per_replica = trainer.reduce_per_replica

    def build(iterator: Any = None, data_batch: Any = None) -> None:
        for _, _, batches in iterator or ():
            data_batch = tf.nest.map_structure(
                lambda x: strategy.experimental_local_results(x)[0], next(batches)
            )
            break
        with strategy.scope():
            model._symbolic_build(data_batch=data_batch)

    def reduce_scalars(values: Any, values_strategy: Any, reduction: str) -> Any:
        if values_strategy is strategy and reduction == "auto":
            return keras.tree.map_structure(
                lambda value: strategy.reduce("MEAN", value, axis=None), values
            )
        return reduce_per_replica(values, values_strategy, reduction)

    model._maybe_symbolic_build = build
    trainer.reduce_per_replica = reduce_scalars
    try:
        yield model
    finally:
        trainer.reduce_per_replica = reduce_per_replica
        del model._maybe_symbolic_build
