"""The settings of a head as attributes.

A compiled model reads the training settings in every step, so you can set them without a new trace.
The prediction settings are fixed when a graph is traced, so their attributes are read-only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import keras
import tensorflow as tf

from tf_dropmax.inference import PredictSetting


class TrainingSetting:
    """A float attribute of a layer that can be set at any time.

    The value is held in a `tf.Variable`, which a graph reads at every step. Checkpoints and weights
    files do not contain the value. If you load one, the value stays the same.

    Args:
        check: Function of the name and a value. It returns the value as a float or raises.
        doc: String, the docstring of the attribute.
    """

    def __init__(self, check: Callable[[str, Any], float], doc: str):
        self._check = check
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, layer: None, owner: type) -> TrainingSetting: ...
    @overload
    def __get__(self, layer: keras.layers.Layer, owner: type) -> float: ...
    def __get__(self, layer, owner):
        if layer is None:
            return self
        if self._key not in vars(layer):
            raise AttributeError(f"`{self._name}` is not set yet.")  # Keras asks before it sets.
        with tf.init_scope():
            return float(self._variable(layer).numpy())

    def __set__(self, layer: keras.layers.Layer, value: Any) -> None:
        value = self._check(self._name, value)
        if self._key not in vars(layer):
            with tf.init_scope():
                # float64 keeps every Python float as it was set. Keras and TensorFlow track the
                # variables that `setattr` gives to a layer. This one must not be tracked.
                variable = tf.Variable(value, trainable=False, dtype=tf.float64, name=self._name)
                vars(layer)[self._key] = variable
        self._variable(layer).assign(value)

    def tensor(self, layer: keras.layers.Layer, dtype: Any) -> tf.Tensor:
        """The value as a scalar tensor. A graph that uses it follows later changes."""
        return tf.cast(self._variable(layer), dtype)

    @property
    def _key(self) -> str:
        return f"_{self._name}_variable"

    def _variable(self, layer: keras.layers.Layer) -> tf.Variable:
        return vars(layer)[self._key]


class PredictAttribute(property):
    """A read-only attribute of a head.

    Args:
        get: Function from the `PredictSetting` of the head to the value.
        doc: String, the docstring of the attribute.
        instead: String, a sentence for the error message: what to call instead of an assignment.
    """

    def __init__(self, get: Callable[[PredictSetting], Any], doc: str, instead: str):
        super().__init__(lambda head: get(head._predict_setting), doc=doc)
        self._instead = instead

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, head: Any, value: Any) -> None:
        raise AttributeError(
            f"`{self._name}` cannot be set, because compiled functions would not follow. "
            f"{self._instead} Received: {self._name}={value!r}"
        )
