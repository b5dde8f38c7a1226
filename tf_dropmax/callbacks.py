"""Callbacks: the test-time mode of a call, and what the head has learned about its masks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax.checks import check_examples, check_one_of, check_positive_int
from tf_dropmax.head import DropMaxHead
from tf_dropmax.inference import PREDICT_MODES
from tf_dropmax.metrics.retain import retain_statistics
from tf_dropmax.modes import heads_of, predict_mode
from tf_dropmax.steps import ArmedStep, armed_step, disarm

_STATISTICS = ("retain_target", "retain_others", "retained_classes", "mask_entropy")


class _Callback(keras.callbacks.Callback):
    """A callback whose copies do not contain the model of an earlier use.

    Not every model can be copied.
    """

    _of_one_use: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        state = {**vars(self), **dict.fromkeys(self._of_one_use)}
        return {name: None if value is self.model else value for name, value in state.items()}


class DropMaxPredict(_Callback):
    """Callback that sets the test-time mode for `predict`, `evaluate` and validation in `fit`.

    The mode is in force while a prediction or evaluation step runs. Training steps and other
    callbacks do not see it. An exception leaves the model in the mode it had. A mode is traced
    once for each model and batch signature. The mode belongs to the model: do not use this
    callback in one thread while another thread predicts.

    Args:
        mode: `"expected"`, `"sampled"`, `"exact"` or `"softmax"`; see `DropMaxHead`.
        samples: `None` or positive int, number of masks in mode `"sampled"`. `None` keeps the
            number of the head. Defaults to `None`.

    Raises:
        ValueError: If `mode` or `samples` is not as above. In use: if the model has no
            `DropMaxHead`, or one call has two of these callbacks.
        RuntimeError: In use: if a callback after this one starts another prediction or evaluation
            of the same kind with the same model before the step.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), tf_dropmax.DropMaxHead(3)])
    >>> x = np.ones((2, 4), "float32")
    >>> exact = model.predict(x, callbacks=[tf_dropmax.DropMaxPredict("exact")], verbose=0)
    >>> exact.shape
    (2, 3)
    """

    _of_one_use = ("_step",)

    def __init__(self, mode: str, samples: int | None = None):
        super().__init__()
        self.mode = check_one_of("mode", mode, PREDICT_MODES)
        self.samples = None if samples is None else check_positive_int("samples", samples)
        self._step: ArmedStep | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        heads_of(self.model)  # Without a head, raise now and not after the first epoch.

    def on_predict_begin(self, logs: Any = None) -> None:
        heads_of(self.model)

    def on_test_begin(self, logs: Any = None) -> None:
        heads_of(self.model)

    def on_predict_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._arm("predict")

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._arm("test")

    def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
        self._check("predict")

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._check("test")

    # Keras may find the end of the data only after `on_..._batch_begin`.

    def on_predict_end(self, logs: Any = None) -> None:
        disarm(self.model, "predict")

    def on_test_end(self, logs: Any = None) -> None:
        disarm(self.model, "test")

    def _arm(self, kind: str) -> None:
        if armed_step(self.model, kind):
            raise ValueError(
                "Expected one DropMaxPredict in a call. Received: another one, with "
                f"mode={self.mode!r}"
            )
        context = partial(predict_mode, self.model, self.mode, self.samples)
        self._step = ArmedStep(self.model, kind, context)

    def _check(self, kind: str) -> None:
        step, self._step = self._step, None
        if step is None or not step.ran:
            call = {"predict": "predict", "test": "evaluate"}[kind]
            raise RuntimeError(
                f"Expected a step in mode {self.mode!r}. Received: another one, because another "
                f"callback replaced the function of the model in `on_{kind}_batch_begin`, for "
                f"example by a call of `{call}`. In the list of callbacks, put DropMaxPredict "
                "after it."
            )


class DropMaxMonitor(_Callback):
    """Callback that logs what the head has learned about its masks, and can change its settings.

    After every epoch it adds means over the given examples to the logs. They reach `history` and
    every callback after this one (`TensorBoard`, `CSVLogger`, `ModelCheckpoint`, ...):

        retain_target      retain probability of the label's class
        retain_others      mean retain probability of the other classes
        retained_classes   expected number of classes that a mask keeps, `sum_t rho_t`
        mask_entropy       mean entropy of a mask, in nats, at most log 2

    It also logs the settings that it changes, with their values in that epoch. If the model has
    several heads, it logs the values of each. Their names then begin with the name of the head and
    an underscore. All heads get the same settings.

    Args:
        x: `None` or the inputs of the model, as for `predict`: a tensor, an array or a structure of
            them, of shape `(examples, ...)`. Use validation data. `None` logs no such values.
            Positions that a Keras mask excludes are ignored, but their labels must be valid too.
            Defaults to `None`.
        y: Integer labels, or floats that are whole numbers, of shape `(examples, ...)` or
            `(examples, ..., 1)`, or one-hot labels of shape `(examples, ..., T)`. Required with
            `x`. Defaults to `None`.
        entropy_weight, temperature, auxiliary_weight: `None`, or a function of the epoch (an int
            from 0) that returns the value of this setting of the head in that epoch. A
            `keras.optimizers.schedules.LearningRateSchedule` is such a function. Default to
            `None`.
        batch_size: Positive int, number of examples in a batch of this callback. Defaults to 256.

    Raises:
        ValueError: If there is nothing to do, `x` and `y` do not match, or an argument is not as
            above. In training: if the model has no `DropMaxHead`, does not call it exactly once
            on `x`, or has two of one name; or a setting has no effect on any head; or a function
            returns a value that the setting does not accept.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), tf_dropmax.DropMaxHead(3)])
    >>> model.compile("adam", tf_dropmax.DropMaxLoss())
    >>> x, y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
    >>> monitor = tf_dropmax.DropMaxMonitor(x, y, entropy_weight=lambda epoch: 0.5**epoch)
    >>> history = model.fit(x, y, epochs=3, callbacks=[monitor], verbose=0).history
    >>> history["entropy_weight"]
    [1.0, 0.5, 0.25]
    >>> len(history["retain_target"])
    3
    """

    _of_one_use = ("_statistics",)

    def __init__(
        self,
        x: Any = None,
        y: Any = None,
        *,
        entropy_weight: Callable[[int], Any] | None = None,
        temperature: Callable[[int], Any] | None = None,
        auxiliary_weight: Callable[[int], Any] | None = None,
        batch_size: int = 256,
    ):
        super().__init__()
        schedules = {
            "entropy_weight": entropy_weight,
            "temperature": temperature,
            "auxiliary_weight": auxiliary_weight,
        }
        for name, schedule in schedules.items():
            if schedule is not None and not callable(schedule):
                raise ValueError(
                    f"`{name}` must be a function of the epoch or `None`. "
                    f"Received: {name}={schedule!r}"
                )
        self.schedules = {name: each for name, each in schedules.items() if each is not None}
        self.batch_size = check_positive_int("batch_size", batch_size)
        if (x is None) != (y is None) or (x is None and not self.schedules):
            given = {"x": x, "y": y, **schedules}
            received = (f"{k}={'None' if v is None else '...'}" for k, v in given.items())
            raise ValueError(
                f"Expected `x` with `y`, a schedule, or both. Received: {', '.join(received)}"
            )
        self.x, self.y = x, None if x is None else _labels(x, y)
        self._statistics: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        heads = heads_of(self.model)
        for name in self.schedules:
            if not any(name in head._objective.settings for head in heads):
                arguments = ("retain_probability", "stochastic", "posterior")
                received = [{each: getattr(head, each) for each in arguments} for head in heads]
                raise ValueError(
                    f"Expected a head on which `{name}` has an effect. Received: {received}"
                )
        names = sorted(head.name for head in heads)
        if self.y is not None and len(set(names)) < len(names):
            raise ValueError(
                "Expected heads with different names, which tell their logs apart. "
                f"Received: {names}"
            )
        classes = min(head.units for head in heads)
        if self.y is not None and not 0 <= self.y.min() <= self.y.max() < classes:
            raise ValueError(
                f"`y` must be in [0, {classes}). "
                f"Received: values from {self.y.min()} to {self.y.max()}"
            )
        self._statistics = tf.function(self._statistics_of)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        for name, schedule in self.schedules.items():
            for head in heads_of(self.model):
                setattr(head, name, schedule(epoch))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs = {} if logs is None else logs
        heads = heads_of(self.model)
        if self.y is not None:
            for head, values in zip(heads, self._means(self.y), strict=True):
                prefix = "" if len(heads) == 1 else f"{head.name}_"
                named = zip(_STATISTICS, values, strict=True)
                logs.update({prefix + name: float(value) for name, value in named})
        logs.update({name: getattr(heads[0], name) for name in self.schedules})

    def on_train_end(self, logs: Any = None) -> None:
        self._statistics = None

    def _means(self, y: np.ndarray) -> np.ndarray:
        """Statistics of every head, averaged over the examples."""
        sums = []
        # The statistics need no masks, but the model draws some in mode "sampled".
        seeds = [head._predict_seeds.state for head in heads_of(self.model)]
        before = [seed.numpy() for seed in seeds]
        try:
            for start in range(0, len(y), self.batch_size):
                rows = slice(start, start + self.batch_size)
                x = keras.tree.map_structure(
                    lambda part, rows=rows: tf.convert_to_tensor(part[rows]), self.x
                )
                sums.append(self._statistics(x, tf.constant(y[rows], tf.int32)).numpy())
        finally:
            for seed, state in zip(seeds, before, strict=True):
                seed.assign(state)
        total = np.sum(sums, axis=0)
        return total[:, 1:] / total[:, :1]

    def _statistics_of(self, x: Any, y: tf.Tensor) -> tf.Tensor:
        """Sums over a batch, after the sum of the weights, shape `(heads, 1 + statistics)`."""
        heads = heads_of(self.model)
        with contextlib.ExitStack() as stack:
            heard = [stack.enter_context(_listening(head)) for head in heads]
            self.model(x, training=False)
        rows = (_mask_statistics(*each, y) for each in zip(heads, heard, strict=True))
        return tf.stack(list(rows))


def _labels(x: Any, y: Any) -> np.ndarray:
    """`y` as an integer array, if it fits `x`."""
    check_examples(x, y=y)
    labels = np.asarray(y)
    whole = labels.dtype.kind in "biu" or (labels.dtype.kind == "f" and not (labels % 1).any())
    if not whole or not len(labels):
        raise ValueError(
            "`y` must be whole numbers, one for each example of `x`. "
            f"Received: {labels.dtype} of shape {labels.shape}"
        )
    return labels.astype("int64")


def _mask_statistics(
    head: DropMaxHead, heard: list[tuple[Any, Any]], labels: tf.Tensor
) -> list[tf.Tensor]:
    if len(heard) != 1:
        raise ValueError(
            f"Expected a model that calls its head {head.name!r} once. "
            f"Received: {len(heard)} calls of it"
        )
    ((features, mask),) = heard
    rho = tf.cast(head.retain_probabilities(features), tf.float64)
    entropy = tf.reduce_mean(-tf.math.xlogy(rho, rho) - tf.math.xlog1py(1 - rho, -rho), axis=-1)
    weight = tf.ones_like(entropy) if mask is None else tf.cast(mask, tf.float64)
    values = (1.0, *retain_statistics(labels, rho), entropy)
    return [tf.reduce_sum(weight * value) for value in values]


@contextlib.contextmanager
def _listening(head: DropMaxHead) -> Iterator[list[tuple[Any, Any]]]:
    """Inside, the inputs and the mask of every prediction of the head are added to a list."""
    heard: list[tuple[Any, Any]] = []
    head._listener = lambda inputs, mask: heard.append((inputs, mask))
    try:
        yield heard
    finally:
        head._listener = None
