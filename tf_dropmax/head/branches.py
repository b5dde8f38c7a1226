"""The linear branches of a head: Keras `Dense` layers on the same features."""

from __future__ import annotations

import inspect
import random
from typing import Any

import keras
import tensorflow as tf

from tf_dropmax.checks import check_one_of
from tf_dropmax.seeds import derived_seed

OUTPUTS = ("classes", "logits", "retain_logits", "retain_probabilities")

# The arguments of `Dense` that a branch may have. The head decides on the others.
_DENSE_ARGUMENTS = frozenset(inspect.signature(keras.layers.Dense.__init__).parameters) - {
    "self",
    "units",
    "activation",
    "activity_regularizer",
    "kwargs",
}


class BranchedLayer(keras.layers.Layer):
    """Base class of the head, which owns its branches.

    Args:
        units: Positive int, the number of classes T.
        names: The names of the branches besides `"classes"`.
        seed: `None` or int, for initializers that have no seed of their own.
        retain: `None` or a dictionary of arguments of `Dense` for these branches.
        **kwargs: Arguments of `Dense` for the branch `"classes"`, and of `Layer`; and `branches`,
            from `get_config`, arguments of single branches.
    """

    def __init__(
        self,
        units: int,
        names: tuple[str, ...],
        seed: int | None,
        retain: dict[str, Any] | None,
        **kwargs: Any,
    ):
        saved = kwargs.pop("branches", {})
        of_dense = {name: kwargs.pop(name) for name in _DENSE_ARGUMENTS & set(kwargs)}
        policy = keras.dtype_policies.get(kwargs.pop("dtype", None))
        if not isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            # The branches are quantized, not the layer around them.
            kwargs["dtype"] = policy.name.rpartition("_from_")[2]
        super().__init__(**{"dtype": policy, **kwargs})
        classes = {"kernel_initializer": "glorot_uniform", "dtype": policy, **of_dense}
        classes |= saved.get("classes", {})
        shared = {name: classes[name] for name in ("use_bias", "dtype") if name in classes}
        retain = {} if retain is None else retain
        known = sorted(_DENSE_ARGUMENTS | {"dtype", "trainable"})
        if not isinstance(retain, dict) or not set(retain) <= set(known):
            raise ValueError(
                f"`retain` must be a dictionary with keys out of {known}. Received: {retain!r}"
            )
        others = {"kernel_initializer": "zeros"} | shared
        arguments = {name: others | saved.get(name, retain) for name in names}
        self.units, self.seed = units, seed
        self.branches = {
            name: _dense(name, units, seed, given)
            for name, given in {"classes": classes, **arguments}.items()
        }
        if not kwargs.get("trainable", True):
            for branch in self.branches.values():
                branch.trainable = False
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        for branch in self.branches.values():
            branch.build(input_shape)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: input_shape[-1]})

    def branch(self, name: str, features: Any) -> tf.Tensor:
        """Logits of a branch, computed in its dtype policy and cast to `output_dtype`."""
        return tf.cast(self.branches[name](features), self.output_dtype)

    @property
    def output_dtype(self) -> str:
        """`"float64"` under that dtype policy, `"float32"` under every other."""
        return "float64" if self.compute_dtype == "float64" else "float32"

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.units)

    def compute_output_spec(
        self, inputs: Any, *args: Any, output: str = "classes", **kwargs: Any
    ) -> keras.KerasTensor:
        check_one_of("output", output, OUTPUTS)
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype=self.output_dtype)

    def get_config(self) -> dict[str, Any]:
        # The branches know what `quantize` and `enable_lora` have changed.
        # If the head is frozen, all are, so that a config with `trainable=True` trains them again.
        branches = {
            name: {**arguments_of(branch), "trainable": branch.trainable or not self.trainable}
            for name, branch in self.branches.items()
        }
        classes, retain = branches.pop("classes"), branches.pop("retain", None)
        branches["classes"] = {"trainable": classes.pop("trainable")}
        own = {"units": self.units, "seed": self.seed, "retain": retain, "branches": branches}
        return {**super().get_config(), **classes, **own}


def _dense(name: str, units: int, seed: int | None, arguments: dict[str, Any]) -> Any:
    """A `Dense` layer. Its initializers without a seed get seeds that depend on `seed` and `name`.

    The arguments are objects or their configurations.
    """
    seeded = {
        key: _seeded(value, derived_seed(seed, f"{name} {key}"))
        for key, value in arguments.items()
        if key.endswith("_initializer")
    }
    return keras.layers.Dense.from_config({**arguments, **seeded, "name": name, "units": units})


def arguments_of(dense: keras.layers.Dense) -> dict[str, Any]:
    """The serialized arguments of a `Dense` layer that a branch may have, and its dtype policy."""
    config = dense.get_config()
    return {key: config[key] for key in config if key in _DENSE_ARGUMENTS or key == "dtype"}


def _seeded(identifier: Any, seed: int | None) -> Any:
    """An initializer of its own for a branch. If it is random and has no seed, it gets this one."""
    state = random.getstate()
    initializer = keras.initializers.get(identifier)
    if seed is not None:
        random.setstate(state)  # Without a seed, it has drawn one from Python's global stream.
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    config = initializer.get_config()
    if config.get("seed", 0) is not None:
        return initializer
    return type(initializer).from_config({**config, "seed": seed})
