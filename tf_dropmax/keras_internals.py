"""What the package reads of Keras that is not public.

Keras has no public way to find the layers inside a layer, to attach a mask to a tensor, or to say
that a metric is better if it is smaller.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


def layers_in(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layer and all layers in it, at any depth."""
    return list(layer._flatten_layers())


def get_mask(tensor: Any) -> Any:
    """The Keras mask of a tensor, or `None`."""
    return getattr(tensor, "_keras_mask", None)


def set_mask(tensor: tf.Tensor, mask: tf.Tensor) -> None:
    """Attaches a Keras mask to a tensor. Keras leaves those positions out of means of losses."""
    tensor._keras_mask = mask


def less_is_better(metric: type[keras.metrics.Metric]) -> type[keras.metrics.Metric]:
    """Tells callbacks with `mode="auto"`, such as `EarlyStopping`, that less is better."""
    metric._direction = "down"
    return metric
