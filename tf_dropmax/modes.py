"""The mode in which a model predicts: a function, a context manager and a callback that set it.

The mode is an attribute of the head. Compiled functions of models follow it; see `head.models`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from tf_dropmax.checks import check_one_of, check_positive_int
from tf_dropmax.head import DropMaxHead
from tf_dropmax.head.inference import PREDICT_MODES
from tf_dropmax.keras_internals import layers_in


def heads_of(model: keras.layers.Layer) -> list[DropMaxHead]:
    """The heads of a model, at any depth.

    Raises:
        ValueError: If `model` is not a Keras model or layer, or has no `DropMaxHead`.
    """
    if not isinstance(model, keras.layers.Layer):
        received = f"{model!r} of type {type(model).__name__}"
        raise ValueError(f"Expected a Keras model or layer. Received: {received}")
    heads = [layer for layer in layers_in(model) if isinstance(layer, DropMaxHead)]
    if not heads:
        raise ValueError(
            f"Expected a model with at least one DropMaxHead. Received: {model.name!r}, which has "
            "none"
        )
    return heads


def set_predict_mode(model: keras.layers.Layer, mode: str, samples: int | None = None) -> None:
    """Sets the mode in which every `DropMaxHead` of a model predicts from now on.

    For one head, set its attributes `predict_mode` and `predict_samples`. The model, the models in
    it and the models around it predict in the new mode. Only a `tf.function` of your own keeps the
    mode in which it was traced. `model.save` and `model.export` store the current mode.

    Args:
        model: A `keras.Model` or `keras.layers.Layer` that contains, at any depth, a
            `DropMaxHead`, or is one.
        mode: `"expected"`, `"sampled"`, `"exact"` or `"softmax"`; see `DropMaxHead`.
        samples: `None` or positive int, number of masks in mode `"sampled"`. `None` keeps the
            number of the head. Defaults to `None`.

    Raises:
        ValueError: If `mode` or `samples` is not as above, or the model has no `DropMaxHead`.
            The model is then unchanged.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), tf_dropmax.DropMaxHead(3)])
    >>> tf_dropmax.set_predict_mode(model, "exact")
    >>> model.layers[-1].predict_mode
    'exact'
    """
    heads = heads_of(model)
    _check(mode, samples)
    for head in heads:
        head.predict_mode = mode
        if samples is not None:
            head.predict_samples = samples


@contextlib.contextmanager
def predict_mode(
    model: keras.layers.Layer, mode: str, samples: int | None = None
) -> Iterator[keras.layers.Layer]:
    """Context manager in which every `DropMaxHead` of a model predicts in the given mode.

    When the block ends, also by an exception, every head returns to its earlier mode. The mode
    belongs to the model: do not change it in one thread while another thread predicts with the same
    model. `set_predict_mode` says what follows.

    Args:
        model, mode, samples: As for `set_predict_mode`.

    Returns:
        A context manager that yields `model`.

    Raises:
        ValueError: If `mode` or `samples` is not as above, or the model has no `DropMaxHead`.

    Example:

    >>> head = tf_dropmax.DropMaxHead(3)
    >>> with tf_dropmax.predict_mode(head, "exact"):
    ...     log_probabilities = head(np.ones((1, 4), "float32"))
    >>> head.predict_mode
    'expected'
    """
    heads = heads_of(model)
    before = [(head.predict_mode, head.predict_samples) for head in heads]
    try:
        set_predict_mode(model, mode, samples)
        yield model
    finally:
        for head, (earlier, number) in zip(heads, before, strict=True):
            head.predict_mode, head.predict_samples = earlier, number


def _check(mode: Any, samples: Any) -> None:
    check_one_of("mode", mode, PREDICT_MODES)
    if samples is not None:
        check_positive_int("samples", samples)


class CopiedWithoutModel(keras.callbacks.Callback):
    """A callback of which `deepcopy` leaves the models out.

    keras-tuner copies callbacks, and some models cannot be copied.
    """

    def __getstate__(self) -> dict[str, Any]:
        models = (keras.Model, _StepInMode)
        return {k: None if isinstance(v, models) else v for k, v in vars(self).items()}


class DropMaxPredict(CopiedWithoutModel):
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

    def __init__(self, mode: str, samples: int | None = None):
        super().__init__()
        _check(mode, samples)
        self.mode, self.samples = mode, samples
        self._step: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        heads_of(self.model)  # Without a head, raise now and not after the first epoch.

    on_test_begin = on_predict_begin = on_train_begin

    def on_predict_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._step = _StepInMode(self.model, "predict", self.mode, self.samples)

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._step = _StepInMode(self.model, "test", self.mode, self.samples)

    def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
        self._step.check()

    def on_predict_end(self, logs: Any = None) -> None:
        # Keras may find the end of the data only after `on_predict_batch_begin`.
        self._step.remove()

    on_test_batch_end, on_test_end = on_predict_batch_end, on_predict_end


class _StepInMode:
    """Stands in the place of a compiled function of a model for one step, which it runs in a mode.

    If another callback raises before the step runs, the object stays in the model. Every later call
    begins with `make_..._function`, so the object is removed there.
    """

    def __init__(self, model: keras.Model, kind: str, mode: str, samples: int | None):
        self._model, self._kind, self._mode, self._ran = model, kind, mode, False
        self._context = lambda: predict_mode(model, mode, samples)
        self._function = getattr(model, f"{kind}_function")
        if isinstance(self._function, _StepInMode):
            raise ValueError(
                f"Expected one DropMaxPredict in a call. Received: another one, with mode={mode!r}"
            )
        setattr(model, f"{kind}_function", self)
        setattr(model, f"make_{kind}_function", self._make)

    def __call__(self, *args: Any) -> Any:
        self.remove()
        self._ran = True
        with self._context():
            return self._function(*args)

    def _make(self, *args: Any, **kwargs: Any) -> Any:
        self.remove()
        return getattr(self._model, f"make_{self._kind}_function")(*args, **kwargs)

    def remove(self) -> None:
        if vars(self._model).get(f"make_{self._kind}_function") == self._make:
            delattr(self._model, f"make_{self._kind}_function")
            if getattr(self._model, f"{self._kind}_function") is self:  # not if compiled since
                setattr(self._model, f"{self._kind}_function", self._function)

    def check(self) -> None:
        if not self._ran:
            raise RuntimeError(
                f"Expected a step in mode {self._mode!r}. Received: another one, because another "
                f"callback called `predict` or `evaluate` in `on_{self._kind}_batch_begin`. In the "
                "list of callbacks, put DropMaxPredict after it."
            )
