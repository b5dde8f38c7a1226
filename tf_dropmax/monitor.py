"""Callback that logs what the heads have learned about their masks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from tf_dropmax import functional
from tf_dropmax.head import DropMaxHead
from tf_dropmax.labels import joint_weights
from tf_dropmax.metrics.retain import retain_statistics
from tf_dropmax.modes import CopiedWithoutModel, heads_of

_STATISTICS = ("retain_target", "retain_others", "retained_classes", "mask_entropy")


class DropMaxMonitor(CopiedWithoutModel):
    """Callback that logs what the head has learned about its masks.

    After every epoch it adds means over the given examples to the logs. They reach `history` and
    every callback after this one (`TensorBoard`, `CSVLogger`, `ModelCheckpoint`, ...):

        retain_target      retain probability of the label's class
        retain_others      mean retain probability of the other classes
        retained_classes   expected number of classes that a mask keeps, `sum_t rho_t`
        mask_entropy       mean entropy of a mask, in nats, at most log 2

    If the model has several heads, the names of their values begin with the name of the head and an
    underscore.

    Args:
        x: Data as for `model.evaluate`. Use validation data. Positions that a Keras mask excludes
            are ignored, but their labels must be valid too.
        y: Labels as for `DropMaxLoss`. If heads have labels of their own, a dictionary or list, as
            for `fit`. A head for which there are no labels is not logged. `None` if `x` has the
            labels. Defaults to `None`.
        batch_size: `None` or positive int, as for `model.evaluate`. Defaults to `None`.

    Raises:
        ValueError: In training: if the model has no `DropMaxHead`, or does not call a head with
            labels exactly once on `x`; or as `model.evaluate`.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), tf_dropmax.DropMaxHead(3)])
    >>> model.compile("adam", tf_dropmax.DropMaxLoss())
    >>> x, y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
    >>> monitor = tf_dropmax.DropMaxMonitor(x, y)
    >>> history = model.fit(x, y, epochs=3, callbacks=[monitor], verbose=0).history
    >>> len(history["retain_target"])
    3
    """

    def __init__(self, x: Any, y: Any = None, *, batch_size: int | None = None):
        super().__init__()
        self.x, self.y, self.batch_size = x, y, batch_size

    def on_train_begin(self, logs: Any = None) -> None:
        heads = heads_of(self.model)
        with self.model.distribute_strategy.scope():
            self._evaluator = _Evaluator(self.model, heads)
            # XLA has no assertions, and the model may not compile with it.
            self._evaluator.compile(None, run_eagerly=self.model.run_eagerly, jit_compile=False)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        seen = self._evaluator.evaluate(
            self.x, self.y, self.batch_size, verbose=0, return_dict=True
        )
        if logs is not None:
            # What `evaluate` returns is the result of one replica.
            means = keras.tree.flatten(self._evaluator.means)
            logs.update({mean.name: float(mean.result()) for mean in means if mean.name in seen})


class _Evaluator(keras.Model):
    """Evaluates the retain probabilities of the heads of a model. Keras adapts the data."""

    def __init__(self, model: keras.Model, heads: list[DropMaxHead]):
        super().__init__(name="evaluator")  # Keras's name would begin with an underscore.
        self.inner, self.heads = model, heads
        self.means = {
            head.name: [keras.metrics.Mean(name=prefix + name) for name in _STATISTICS]
            for head in heads
            for prefix in ["" if len(heads) == 1 else f"{head.name}_"]
        }

    def call(self, x: Any) -> Any:  # With it, Keras builds the model under a strategy.
        return self.inner(x, training=False)

    def test_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with contextlib.ExitStack() as stack:
            calls = [stack.enter_context(_calls_of(head)) for head in self.heads]
            outputs = self.inner(x, training=False)
        logs = {}
        for head, seen in zip(self.heads, calls, strict=True):
            labels, weights = (_of_head(head, given, seen, outputs) for given in (y, sample_weight))
            if labels is None:
                continue
            if len(seen) != 1:
                raise ValueError(
                    f"Expected a model that calls its head {head.name!r} once. "
                    f"Received: {len(seen)} calls of it"
                )
            retain_logits, mask, _ = seen[0]
            entropy = tf.reduce_mean(functional.mask_entropy(retain_logits), axis=-1)
            values = (*retain_statistics(labels, tf.sigmoid(retain_logits)), entropy)
            weight = joint_weights(values[0], weights, mask)
            for mean, value in zip(self.means[head.name], values, strict=True):
                mean.update_state(value, weight)
                logs[mean.name] = mean.result()
        if not logs:
            received = list(y) if isinstance(y, dict) else y
            raise ValueError(f"Expected labels of a head in `x` or `y`. Received: {received}")
        return logs


def _of_head(head: DropMaxHead, given: Any, calls: list[Any], outputs: Any) -> Any:
    """What a model was given for the output that a head computes, or for all outputs."""
    if not isinstance(given, dict | list | tuple):
        return given
    if not isinstance(given, dict):
        given, outputs = (dict(enumerate(keras.tree.flatten(each))) for each in (given, outputs))
    named = outputs if isinstance(outputs, dict) else {}
    names = [name for name, output in named.items() if any(output is call[-1] for call in calls)]
    return next((given[name] for name in (*names, head.name) if name in given), None)


@contextlib.contextmanager
def _calls_of(head: DropMaxHead) -> Iterator[list[tuple[Any, Any, Any]]]:
    """Inside, retain logits, mask and output of every call of the head are added to a list.

    The output is that of mode `"expected"`.
    """
    calls: list[tuple[Any, Any, Any]] = []
    call = head.call

    def listen(inputs: Any, training: bool = False, mask: Any = None, **kwargs: Any) -> Any:
        if kwargs.get("output", "classes") != "classes":
            return call(inputs, training, mask, **kwargs)
        logits, retain_logits = (call(inputs, output=o) for o in ("logits", "retain_logits"))
        output = functional.expected_log_probabilities(logits, retain_logits)  # It draws no masks.
        calls.append((retain_logits, mask, output))
        return output

    head.call = listen  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        del head.call
