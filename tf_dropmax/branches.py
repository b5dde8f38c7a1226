"""Linear branches on the same features: their weights, initial values and matrix products."""

from __future__ import annotations

import random
from typing import Any

import keras
import tensorflow as tf

from tf_dropmax.objectives import class_scale
from tf_dropmax.seeds import derived_seed

KINDS = ("initializer", "regularizer", "constraint")
WEIGHTS = ("kernel", "bias", "retain_kernel", "retain_bias")


class BranchedLayer(keras.layers.Layer):
    """Base class of the head. It owns a kernel and a bias for every branch.

    The branch `"classes"` has the weights `kernel` and `bias`. Every other branch has the weights
    `NAME_kernel` and `NAME_bias`, with the regularizers and constraints of the branch `"retain"`.
    A branch that is neither of these two starts with small kernels and zero biases.

    Args:
        units: Positive int, the number of classes T.
        use_bias: Bool, whether the branches have a bias.
        seed: `None` or int, for initializers that have no seed of their own.
        weight_settings: Dictionary from every name in `WEIGHTS` to an initializer, a regularizer
            and a constraint, each as `keras.initializers.get` and the like accept it.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        units: int,
        use_bias: bool,
        seed: int | None,
        weight_settings: dict[str, tuple[Any, Any, Any]],
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.units = units
        self.use_bias = use_bias
        self.seed = seed
        self._branches: tuple[str, ...] = ("classes",)
        for weight in WEIGHTS:
            initializer, regularizer, constraint = weight_settings[weight]
            seeded = _seeded(initializer, derived_seed(seed, weight))
            setattr(self, f"{weight}_initializer", seeded)
            setattr(self, f"{weight}_regularizer", keras.regularizers.get(regularizer))
            setattr(self, f"{weight}_constraint", keras.constraints.get(constraint))
        self.input_spec = keras.layers.InputSpec(min_ndim=2)

    def build(self, input_shape: Any) -> None:
        features = input_shape[-1]
        if features is None:
            raise ValueError(
                f"The last dimension of the inputs of a {type(self).__name__} must be known. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        for branch in self._branches:
            prefix = _prefix(branch)
            kernel = self._add(prefix, "kernel", (features, self.units))
            bias = self._add(prefix, "bias", (self.units,)) if self.use_bias else None
            setattr(self, f"{prefix}kernel", kernel)
            setattr(self, f"{prefix}bias", bias)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})

    def _add(self, prefix: str, weight: str, shape: tuple[int, ...]) -> Any:
        like = prefix and "retain_"
        initializer, regularizer, constraint = (
            getattr(self, f"{like}{weight}_{kind}") for kind in KINDS
        )
        if prefix not in ("", "retain_"):
            initializer = "zeros" if weight == "bias" else self._small_start(prefix + weight)
        return self.add_weight(
            name=prefix + weight,
            shape=shape,
            initializer=initializer,
            regularizer=regularizer,
            constraint=constraint,
        )

    def _small_start(self, weight: str) -> Any:
        # With many classes the posterior must start close to the prior. Otherwise the divergence
        # between them, a sum over classes, dominates the loss, and the features vanish.
        seed = derived_seed(self.seed, weight)
        scale = class_scale(self.units) ** 2
        return keras.initializers.VarianceScaling(scale, "fan_avg", "uniform", seed=seed)

    def _product(self, features: Any, branch: str) -> tf.Tensor:
        """Logits of a branch. The matrix product is in the compute dtype, the rest is not."""
        kernel, bias = (
            getattr(self, f"{_prefix(branch)}{weight}") for weight in ("kernel", "bias")
        )
        features, kernel = (keras.ops.cast(x, self.compute_dtype) for x in (features, kernel))
        product = tf.cast(keras.ops.matmul(features, kernel), self._output_dtype)
        return product if bias is None else product + tf.cast(bias, self._output_dtype)

    def _checked(self, features: Any) -> tf.Tensor:
        """Features that did not come through `__call__`, as a tensor that fits the weights."""
        if isinstance(features, keras.KerasTensor):
            raise ValueError(
                "Expected features that have values. This method cannot be part of a functional "
                'model. Retain probabilities can: `head(x, output="retain_probabilities")`. '
                f"Received: {features}"
            )
        features = tf.convert_to_tensor(features)
        self._check_dtype(features.dtype)
        if not self.built:
            self.build(features.shape)
        expected = self.kernel.shape[0]
        if features.shape.rank is None or features.shape[-1] != expected:
            raise ValueError(
                f"The features must have last dimension {expected}. "
                f"Received: features.shape={features.shape}"
            )
        return features

    def _check_dtype(self, dtype: Any) -> None:
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(dtype)):
            raise ValueError(
                f"The inputs of a {type(self).__name__} must be floating point. "
                f"Received: dtype={dtype}"
            )

    @property
    def _output_dtype(self) -> str:
        return "float64" if self.compute_dtype == "float64" else "float32"

    def get_config(self) -> dict[str, Any]:
        config = {"units": self.units, "use_bias": self.use_bias, "seed": self.seed}
        for weight in WEIGHTS:
            for kind in KINDS:
                serialize = getattr(keras, f"{kind}s").serialize
                config[f"{weight}_{kind}"] = serialize(getattr(self, f"{weight}_{kind}"))
        return {**super().get_config(), **config}


def _prefix(branch: str) -> str:
    return "" if branch == "classes" else f"{branch}_"


def _seeded(identifier: Any, seed: int | None) -> Any:
    """The initializer. If it is random and has no seed, it gets this one."""
    if seed is None:
        return keras.initializers.get(identifier)
    state = random.getstate()
    initializer = keras.initializers.get(identifier)
    random.setstate(state)  # Without a seed, it has drawn one from Python's global stream.
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    config = initializer.get_config()
    if config.get("seed", 0) is not None:
        return initializer
    return type(initializer).from_config({**config, "seed": seed})
