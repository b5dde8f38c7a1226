"""The compiled functions of a Keras model, and a step that stands in for one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import keras


class ArmedStep:
    """Stands in a model for its function, and runs the next step, and no other, in a context.

    Args:
        model: A `keras.Model`.
        kind: `"test"` or `"predict"`.
        context: Function without arguments that returns the context manager of the step.
    """

    def __init__(
        self,
        model: keras.Model,
        kind: str,
        context: Callable[[], contextlib.AbstractContextManager[Any]],
    ):
        self._model, self._kind, self._context = model, kind, context
        self.ran = False
        self.function = getattr(model, f"{kind}_function")
        setattr(model, f"{kind}_function", self)
        # If another callback raises before the step runs, the step stays in the model. Nothing
        # else tells of a later call: it begins with `make_..._function`, which removes the step.
        setattr(model, f"make_{kind}_function", self._make)

    def _make(self, *args: Any, **kwargs: Any) -> Any:
        disarm(self._model, self._kind)
        return getattr(self._model, f"make_{self._kind}_function")(*args, **kwargs)

    def __call__(self, *args: Any) -> Any:
        disarm(self._model, self._kind)
        self.ran = True
        with self._context():
            getattr(self._model, f"make_{self._kind}_function")()
            return getattr(self._model, f"{self._kind}_function")(*args)


def armed_step(model: keras.Model, kind: str) -> ArmedStep | None:
    """The step that waits in a model, or `None`."""
    step = getattr(vars(model).get(f"make_{kind}_function"), "__self__", None)
    return step if isinstance(step, ArmedStep) else None


def disarm(model: keras.Model, kind: str) -> None:
    """Takes the step that waits in a model out of it, if there is one."""
    step = armed_step(model, kind)
    if step is not None:
        delattr(model, f"make_{kind}_function")
        if getattr(model, f"{kind}_function") is step:  # It is not if the model was compiled.
            setattr(model, f"{kind}_function", step.function)


def get_function(model: keras.Model, kind: str) -> Any:
    """The function of a model, also while a step waits in its place."""
    function = getattr(model, f"{kind}_function")
    return function.function if isinstance(function, ArmedStep) else function


def set_function(model: keras.Model, kind: str, function: Any) -> None:
    """Replaces the function of a model. A step that waits in its place goes on waiting."""
    present = getattr(model, f"{kind}_function")
    if isinstance(present, ArmedStep):
        present.function = function
    else:
        setattr(model, f"{kind}_function", function)


def make_function(model: keras.Model, kind: str) -> Any:
    """Lets Keras make the function of a model, which must be `None`, and returns it."""
    armed = getattr(model, f"{kind}_function")
    make = f"make_{kind}_function"
    if isinstance(armed, ArmedStep):
        setattr(model, f"{kind}_function", None)
        getattr(type(model), make)(model)
        armed.function = getattr(model, f"{kind}_function")
        setattr(model, f"{kind}_function", armed)
        return armed.function
    getattr(model, make)()
    return getattr(model, f"{kind}_function")
