"""Settings of a head as attributes that are checked and can be set at any time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


class TrainingSetting:
    """A float attribute of a layer. A compiled model reads its value in every step.

    The value is held in a `tf.Variable`. Checkpoints and weights files do not contain the value. If
    you load one, the value stays the same.

    Args:
        check: Function of the name and a value. It returns the value as a float or raises.
        doc: String, the docstring of the attribute.
    """

    def __init__(self, check: Callable[[str, Any], float], doc: str):
        self._check = check
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: keras.layers.Layer | None, owner: type) -> Any:
        if layer is None:
            return self
        with tf.init_scope():
            return float(self._variable(layer).numpy())

    def __set__(self, layer: keras.layers.Layer, value: Any) -> None:
        self._variable(layer).assign(self._check(self._name, value))

    def tensor(self, layer: keras.layers.Layer, dtype: Any) -> tf.Tensor:
        """The value as a scalar tensor. A graph that uses it follows later changes."""
        return tf.cast(tf.convert_to_tensor(self._variable(layer)), dtype)

    def _variable(self, layer: keras.layers.Layer) -> tf.Variable:
        key = f"_{self._name}_variable"
        if key not in vars(layer):
            with tf.init_scope():
                # float64 keeps every Python float as it was set. Keras and TensorFlow track the
                # variables that `setattr` gives to a layer. This one must not be tracked.
                variable = tf.Variable(0.0, trainable=False, dtype=tf.float64, name=self._name)
                vars(layer)[key] = variable
        return vars(layer)[key]


class CheckedSetting(property):
    """An attribute that a layer reads when it is traced.

    Args:
        check: Function of the name and a value. It returns the value or raises.
        doc: String, the docstring of the attribute.
    """

    def __init__(self, check: Callable[[str, Any], Any], doc: str):
        super().__init__(lambda layer: getattr(layer, self._key), self._checked, doc=doc)
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name, self._key = name, f"_{name}"

    def _checked(self, layer: keras.layers.Layer, value: Any) -> None:
        vars(layer)[self._key] = self._check(self._name, value)
