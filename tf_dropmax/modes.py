"""Which mode a model predicts in. As with `training`, the mode is fixed when a graph is traced.

A change therefore has two halves: the setting of the heads, and the compiled functions of the
models whose graphs hold them. The functions of every mode are kept, so that a return to a mode
traces nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from tf_dropmax.head import DropMaxHead
from tf_dropmax.inference import PredictSetting

_KINDS = ("train", "test", "predict")


def set_predict_mode(model: keras.layers.Layer, mode: str, samples: int = 30) -> None:
    """Sets the mode in which every `DropMaxHead` of a model predicts from now on.

    Compiled functions follow: those of `model`, of the models in it, and of the models that it is
    in. A `tf.function` of your own keeps the mode that it was traced in. `model.save` and
    `model.export` keep the mode.

    Args:
        model: A `keras.Model` or `keras.layers.Layer` that contains, at any depth, a
            `DropMaxHead`, or is one.
        mode: `"expected"`, `"sampled"`, `"exact"` or `"softmax"`; see `DropMaxHead`.
        samples: Positive int, number of masks in mode `"sampled"`. Defaults to 30.

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
    """Sets the temperature of the log-probabilities for the mode that a model predicts in.

    Log-probabilities are divided by the temperature and normalised again. Training does not use
    it. Every mode has a temperature of its own. `calibrate` fits it; a temperature of 1.0 undoes
    that.

    Args:
        model: A `keras.Model` or `keras.layers.Layer` that contains, at any depth, a
            `DropMaxHead`, or is one.
        temperature: Positive float. Defaults to 1.0.

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


@contextlib.contextmanager
def predict_mode(
    model: keras.layers.Layer, mode: str, samples: int = 30
) -> Iterator[keras.layers.Layer]:
    """Context manager in which every `DropMaxHead` of a model predicts in the given mode.

    It applies to `predict`, `evaluate` and direct calls, of `model`, of the models in it, and of
    the models that it is in. On leaving, also by an exception, every head is back in the mode it
    had. A `tf.function` of your own keeps the mode that it was traced in. The mode belongs to the
    model: do not change it in one thread while another thread predicts.

    Args:
        model: A `keras.Model` or `keras.layers.Layer` that contains, at any depth, a
            `DropMaxHead`, or is one.
        mode: `"expected"`, `"sampled"`, `"exact"` or `"softmax"`; see `DropMaxHead`.
        samples: Positive int, number of masks in mode `"sampled"`. Defaults to 30.

    Yields:
        `model`.

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
    _switch(model, heads, [head._predict_setting.changed(mode, samples) for head in heads])
    try:
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
    return [layer for layer in model._flatten_layers() if isinstance(layer, DropMaxHead)]


def _switch(
    model: keras.layers.Layer, heads: Sequence[DropMaxHead], settings: Sequence[PredictSetting]
) -> None:
    """Gives the heads new settings, and every model around them the functions of that mode."""
    layers = {model, *(layer for head in heads for layer in head._traced_in)}
    models = [layer for layer in layers if isinstance(layer, keras.Model)]
    for each in models:
        _put_functions_away(each)
    for head, setting in zip(heads, settings, strict=True):
        head._predict_setting = setting
    for each in models:
        _take_functions_out(each)


def _put_functions_away(model: keras.Model) -> None:
    mode = _mode_of(model)
    for kind, kept in _functions(model).items():
        function = getattr(model, f"{kind}_function")
        if kept and kept.get(mode) is not function:
            kept.clear()  # `compile` or `make_..._function` has replaced it: all are outdated.
        if function is not None:
            kept[mode] = function


def _take_functions_out(model: keras.Model) -> None:
    mode = _mode_of(model)
    for kind, kept in _functions(model).items():
        setattr(model, f"{kind}_function", kept.get(mode))
        if kept and mode not in kept:
            # Not left to Keras, so that `None` later means that the model was compiled.
            getattr(model, f"make_{kind}_function")()
            kept[mode] = getattr(model, f"{kind}_function")


def _functions(model: keras.Model) -> dict[str, dict[Any, Any]]:
    """The functions of a model by kind and mode.

    They refer to the model, so they are kept in it: a global table would keep it alive. They are
    no state, so they are kept where neither Keras nor TensorFlow tracks them.
    """
    return vars(model).setdefault("_dropmax_functions", {kind: {} for kind in _KINDS})


def _mode_of(model: keras.Model) -> tuple[Any, ...]:
    """What the graphs of a model depend on: the settings of all its heads."""
    return tuple(head._predict_setting.traced for head in _heads(model))
