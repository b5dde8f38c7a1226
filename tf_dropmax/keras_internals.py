"""What the package reads of Keras that is not public.

Keras has no public way to find the layers inside a layer, to know the model that is being traced,
or to attach a mask to a tensor. Nothing else in the package reads private names of Keras, except
`multi_worker_workaround`, which is to be removed one day.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

try:
    from keras.src.backend.common.global_state import get_global_attribute
except ImportError as error:
    raise ImportError(f"tf_dropmax does not support Keras {keras.__version__}: {error}") from error
if not hasattr(keras.layers.Layer, "_flatten_layers"):
    raise ImportError(
        f"tf_dropmax does not support Keras {keras.__version__}: Layer._flatten_layers is missing"
    )


def layers_in(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layer and all layers in it, at any depth."""
    return list(layer._flatten_layers())


def traced_layer() -> keras.layers.Layer | None:
    """The outermost layer, usually a model, that is being called in a graph.

    Returns:
        A layer. `None` in eager mode, or if the `call` of a layer was called and not the layer.

    Raises:
        RuntimeError: If this version of Keras does not tell.
    """
    if tf.executing_eagerly():
        return None
    context = _call_context()
    if context is None and not _keras_has_call_contexts():
        raise RuntimeError(
            f"tf_dropmax does not support Keras {keras.__version__}: no call context"
        )
    return None if context is None else context.entry_layer


def _call_context() -> Any:
    return get_global_attribute("current_call_ctx")


def _keras_has_call_contexts() -> bool:
    seen = []
    with tf.init_scope():
        keras.layers.Lambda(lambda x: seen.append(_call_context()), name="probe")(tf.zeros(1))
    return seen != [None]


def get_mask(tensor: Any) -> Any:
    """The Keras mask of a tensor, or `None`."""
    return getattr(tensor, "_keras_mask", None)


def set_mask(tensor: tf.Tensor, mask: tf.Tensor) -> None:
    """Attaches a Keras mask to a tensor. Keras leaves those positions out of means of losses."""
    tensor._keras_mask = mask
