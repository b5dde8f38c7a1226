"""The models around a head: the mode of their compiled functions, and the loss they train with.

A graph keeps the mode in which it was traced. So an object that has one function for each mode
stands in the place of a compiled function of a model. At every call it asks the heads for their
mode.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import keras

# The methods of a model that run its compiled functions, or a step of theirs.
_KINDS = {"fit": "train", "evaluate": "test", "predict": "predict"}
_KINDS |= {f"{kind}_step": kind for kind in ("train", "test", "predict")}
_KINDS |= {f"{kind}_on_batch": kind for kind in ("train", "test", "predict")}
_KEPT = 8  # Functions kept for each model and kind. The oldest is dropped first.


def running_models() -> Iterator[tuple[keras.Model, str]]:
    """The models whose methods, such as `fit`, are running, and the kinds of their functions.

    A head that is being traced finds the models whose functions will keep the trace, however they
    call the head. The methods are found on the stack. The innermost comes first. A pair may come
    more than once. The last is that of the method of Keras that called a compiled function.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if kind := _KINDS.get(frame.f_code.co_name):
            model = frame.f_locals.get("self")
            if isinstance(model, keras.Model):
                yield model, kind
                of_keras = frame.f_globals["__name__"].startswith("keras.")
                if of_keras and not frame.f_code.co_name.endswith("_step"):
                    return  # Beyond is a callback of another call, if anything.
        frame = frame.f_back


class FunctionByMode:
    """A compiled function for each mode. It stands in the place of one of a model.

    `compile` and `make_..._function(force=True)` replace this object, and so the functions of all
    modes at once.

    Args:
        model: A `keras.Model`.
        kind: `"train"`, `"test"` or `"predict"`.
    """

    def __init__(self, model: keras.Model, kind: str):
        self._model, self._kind = model, kind
        self._heads: list[Any] = []
        self._functions = {(): getattr(model, f"{kind}_function")}

    def add(self, head: Any) -> None:
        """Registers a head whose prediction is in the function of the current mode."""
        if all(head is not other for other in self._heads):
            function = self._functions.get(self._mode())
            self._heads.append(head)
            self._functions = {self._mode(): function} if function else {}

    def __call__(self, *args: Any) -> Any:
        mode = self._mode()
        function = self._functions.get(mode)
        if function is None:
            function = self._functions[mode] = self._made()
            if len(self._functions) > _KEPT:
                del self._functions[next(iter(self._functions))]
        return function(*args)

    def _mode(self) -> tuple[Any, ...]:
        return tuple(head.traced_setting for head in self._heads)

    def _made(self) -> Any:
        """A new function, which Keras traces in the present mode."""
        getattr(self._model, f"make_{self._kind}_function")(force=True)
        function = getattr(self._model, f"{self._kind}_function")
        setattr(self._model, f"{self._kind}_function", self)
        return function


def follow_mode(head: Any) -> None:
    """Makes the compiled functions that are being traced follow the mode of a head.

    Only a `tf.function` of the user's own keeps the mode in which it was traced.
    """
    for model, kind in running_models():
        if not isinstance(getattr(model, f"{kind}_function"), FunctionByMode):
            setattr(model, f"{kind}_function", FunctionByMode(model, kind))
        getattr(model, f"{kind}_function").add(head)


def check_loss() -> None:
    """Refuses the training of a head without a loss, or by losses that take its scores for logits.

    It allows compiled losses of the user's own, and models with their own `train_step` or
    `compute_loss`. A model whose layers add its only loss needs a `compute_loss`.

    Raises:
        ValueError: If the model was compiled without a loss or only with losses of Keras, or is a
            `keras.distillation.Distiller`.
    """
    model, kind = next(running_models(), (None, None))
    if model is None or kind != "train":
        return
    if isinstance(model, keras.distillation.Distiller):
        raise ValueError(
            "A `Distiller` takes the scores of a DropMaxHead for logits, and ignores its entropy "
            "term. Train the student itself with `DropMaxLoss`, with the probabilities of the "
            f"teacher as soft labels. Received: {model.name!r}"
        )
    losses = [loss for loss in keras.tree.flatten(model.loss) if loss is not None]
    own_step = any(
        getattr(type(model), method) is not getattr(keras.Model, method)
        for method in ("train_step", "compute_loss")
    )
    if not own_step and all(map(_is_of_keras, losses)):
        raise ValueError(
            "A model with a DropMaxHead must be compiled with `tf_dropmax.DropMaxLoss()`, because "
            "the head returns scores in training, not logits or probabilities. If a layer adds "
            f"`DropMaxLoss`, override `compute_loss` of the model. Received: loss={model.loss!r}"
        )


def _is_of_keras(loss: Any) -> bool:
    loss = keras.losses.get(loss)
    module = (loss if inspect.isfunction(loss) else type(loss)).__module__.split(".")
    return module[0] == "keras" and "losses" in module
