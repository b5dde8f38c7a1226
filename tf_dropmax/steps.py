"""A step that stands in for a compiled function of a Keras model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras


class ArmedStep:
    """Replaces a compiled function of a model for one step, and runs that step in a context.

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
        self.arm()

    def arm(self) -> None:
        """Puts the step in the place of the function."""
        self.function = getattr(self._model, f"{self._kind}_function")
        setattr(self._model, f"{self._kind}_function", self)
        # If another callback raises before the step runs, the step stays in the model. Nothing
        # else tells of a later call: it begins with `make_..._function`, which removes the step.
        setattr(self._model, f"make_{self._kind}_function", self._make)

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


@contextlib.contextmanager
def disarmed(model: keras.Model) -> Iterator[None]:
    """Context manager in which no step waits in a model. At its end, the same steps wait again."""
    waiting = [step for kind in ("test", "predict") if (step := armed_step(model, kind))]
    for kind in ("test", "predict"):
        disarm(model, kind)
    try:
        yield
    finally:
        for step in waiting:
            step.arm()
