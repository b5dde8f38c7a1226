"""The mode in which a model predicts. A graph keeps the mode in which it was traced.

A change of the mode therefore changes two things: the settings of the heads, and the compiled
functions of the models that contain them. The functions of every mode are kept, so that a return to
a mode traces nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from tf_dropmax.head import DropMaxHead, traced_heads
from tf_dropmax.inference import PredictSetting
from tf_dropmax.keras_internals import layers_in
from tf_dropmax.steps import disarmed

_KINDS = ("train", "test", "predict")
_KEPT_SAMPLES = 3  # Functions are kept for this many numbers of samples.


def set_predict_mode(model: keras.layers.Layer, mode: str, samples: int | None = None) -> None:
    """Sets the mode in which every `DropMaxHead` of a model predicts from now on.

    You can change the mode at any time. `fit`, `predict` and `evaluate` follow: those of `model`,
    of the models in it, and of the models that call it in their `call`. Only a `tf.function` of
    your own keeps the mode in which it was traced. If your own `train_step`, `test_step` or
    `predict_step` calls an inner model that contains the head, pass the outer model, not the inner
    one. `model.save` and `model.export` store the current mode.

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
    _switch(model, heads, [head._predict_setting.changed(mode, samples) for head in heads])


def set_predict_temperature(model: keras.layers.Layer, temperature: float = 1.0) -> None:
    """Sets the temperature of the log-probabilities in the current mode of a model.

    Log-probabilities are divided by the temperature and normalised again. Training does not use it.
    Every mode has a temperature of its own. `calibrate` fits it. Set it to 1.0 to undo a
    calibration.

    Args:
        model: A `keras.Model` or `keras.layers.Layer` that contains, at any depth, a
            `DropMaxHead`, or is one.
        temperature: Float in [1e-6, 1e6]. Defaults to 1.0.

    Raises:
        ValueError: If `temperature` is not as above, or the model has no `DropMaxHead`. The model
            is then unchanged.

    Example:

    >>> head = tf_dropmax.DropMaxHead(3)
    >>> tf_dropmax.set_predict_temperature(head, 2.0)
    >>> head.predict_temperature
    2.0
    """
    heads = heads_of(model)
    _switch(model, heads, [head._predict_setting.with_temperature(temperature) for head in heads])


def predict_mode(
    model: keras.layers.Layer, mode: str, samples: int | None = None
) -> contextlib.AbstractContextManager[keras.layers.Layer]:
    """Context manager in which every `DropMaxHead` of a model predicts in the given mode.

    It applies to `predict`, `evaluate` and direct calls, of `model`, of the models in it, and of
    the models that call it in their `call`. When the block ends, also by an exception, every head
    returns to its earlier mode. Only a `tf.function` of your own keeps the mode in which it was
    traced. If your own `train_step`, `test_step` or `predict_step` calls an inner model that
    contains the head, pass the outer model, not the inner one. The mode belongs to the model: do
    not change it in one thread while another thread predicts with the same model.

    Args:
        model: A `keras.Model` or `keras.layers.Layer` that contains, at any depth, a
            `DropMaxHead`, or is one.
        mode: `"expected"`, `"sampled"`, `"exact"` or `"softmax"`; see `DropMaxHead`.
        samples: `None` or positive int, number of masks in mode `"sampled"`. `None` keeps the
            number of the head. Defaults to `None`.

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
    for head in heads:
        head._predict_setting.changed(mode, samples)  # Raises here and not where the block begins.
    return _in_mode(model, heads, mode, samples)


@contextlib.contextmanager
def _in_mode(
    model: keras.layers.Layer, heads: Sequence[DropMaxHead], mode: str, samples: int | None
) -> Iterator[keras.layers.Layer]:
    before = [(head.predict_mode, head.predict_samples) for head in heads]
    settings = [head._predict_setting.changed(mode, samples) for head in heads]
    try:
        _switch(model, heads, settings)
        yield model
    finally:
        present = [head._predict_setting for head in heads]  # It may have been calibrated.
        back = [now.changed(*then) for now, then in zip(present, before, strict=True)]
        _switch(model, heads, back)


def heads_of(model: keras.layers.Layer) -> list[DropMaxHead]:
    """The heads of a model, at any depth.

    Raises:
        ValueError: If `model` is not a Keras model or layer, or has no `DropMaxHead`.
    """
    if not isinstance(model, keras.layers.Layer):
        received = f"{model!r} of type {type(model).__name__}"
        raise ValueError(f"Expected a Keras model or layer. Received: {received}")
    heads = _heads(model)
    if not heads:
        raise ValueError(
            f"Expected a model with at least one DropMaxHead. Received: {model.name!r}, which has "
            "none"
        )
    return heads


def _heads(model: keras.layers.Layer) -> list[DropMaxHead]:
    return [layer for layer in layers_in(model) if isinstance(layer, DropMaxHead)]


def _switch(
    model: keras.layers.Layer, heads: Sequence[DropMaxHead], settings: Sequence[PredictSetting]
) -> None:
    """Gives the heads new settings, and every model around them the functions of that mode."""
    layers = {model, *(layer for head in heads for layer in head._traced_in)}
    models = [layer for layer in layers if isinstance(layer, keras.Model)]
    with contextlib.ExitStack() as stack:
        for each in models:
            stack.enter_context(disarmed(each))
            _kept_functions(each).put_away()
        for head, setting in zip(heads, settings, strict=True):
            head._predict_setting = setting
            head._switches += 1
        for each in models:
            _kept_functions(each).take_out()


def _kept_functions(model: keras.Model) -> _KeptFunctions:
    """The functions of a model for every mode.

    They refer to the model, so they are kept in it: a global table would keep it alive. They are
    no state, so they are kept where neither Keras nor TensorFlow tracks them.
    """
    if "_dropmax_functions" not in vars(model):
        vars(model)["_dropmax_functions"] = _KeptFunctions(model)
    return vars(model)["_dropmax_functions"]


class _KeptFunctions:
    """The compiled functions of a model, by kind and mode."""

    def __init__(self, model: keras.Model):
        self._model = model
        self._kept: dict[str, dict[Any, Any]] = {kind: {} for kind in _KINDS}
        # The mode in which Keras traced the present functions, and how often the heads had been
        # switched then. If that has changed, a head was switched by way of a model that does not
        # know this one, and the mode is unknown.
        self._mode: Any = self._state_of_heads()[0]
        self._switches = 0

    def _state_of_heads(self) -> tuple[tuple[Any, ...], int]:
        """What the graphs of the model depend on, and how often it was changed."""
        heads = dict.fromkeys([*_heads(self._model), *traced_heads(self._model)])
        mode = tuple(head._predict_setting.traced for head in heads)
        return mode, sum(head._switches for head in heads)

    def put_away(self) -> None:
        if self._switches != self._state_of_heads()[1]:
            self._mode = None
        for kind, kept in self._kept.items():
            function = getattr(self._model, f"{kind}_function")
            if kept and kept.get(self._mode) is not function:
                kept.clear()  # `compile` or `make_..._function` replaced it: all are outdated.
            if function is not None:
                _keep(kept, self._mode, function)

    def take_out(self) -> None:
        before = self._mode
        self._mode, self._switches = self._state_of_heads()
        for kind, kept in self._kept.items():
            needed = bool(kept) and (before is None or self._mode not in kept)
            if before is None:
                kept.clear()
            setattr(self._model, f"{kind}_function", kept.get(self._mode))
            if needed:
                # Not left to Keras, so that `None` later means that the model was compiled.
                getattr(self._model, f"make_{kind}_function")()
                _keep(kept, self._mode, getattr(self._model, f"{kind}_function"))


def _keep(kept: dict[Any, Any], mode: tuple[Any, ...] | None, function: Any) -> None:
    """Adds a function. Drops those of earlier temperatures and of the oldest numbers of samples."""
    kept.pop(mode, None)
    kept[mode] = function
    alike = [each for each in kept if _part(each, 0) == _part(mode, 0)]
    recent = [each for each in alike if _part(each, 2) == _part(mode, 2)][-_KEPT_SAMPLES:]
    for outdated in set(alike) - set(recent):
        del kept[outdated]


def _part(mode: tuple[Any, ...] | None, index: int) -> Any:
    """The mode names (0) or the temperatures (2) of all heads."""
    return mode and tuple(head[index] for head in mode)
