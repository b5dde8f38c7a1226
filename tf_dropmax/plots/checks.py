"""Checks of the arrays to draw. Every message says what was expected and what was received."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def check_array(
    name: str, value: ArrayLike, shape: str, fits: Callable[[np.ndarray], bool]
) -> np.ndarray:
    array = np.asarray(value)
    if not fits(array) or array.size == 0:
        raise ValueError(
            f"`{name}` must have shape {shape} and at least one value. "
            f"Received: shape {array.shape}"
        )
    return array


def check_labels(name: str, value: ArrayLike, count: int, classes: int | None = None) -> np.ndarray:
    labels = check_array(name, value, f"({count},)", lambda a: a.shape == (count,))
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"`{name}` must be integers. Received: dtype {labels.dtype}")
    if labels.min() < 0 or (classes and labels.max() >= classes):
        raise ValueError(
            f"`{name}` must be in [0, {classes or 'T'}). "
            f"Received: labels from {labels.min()} to {labels.max()}"
        )
    return labels


def check_predictions(
    log_probabilities: ArrayLike, labels: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities in float64, and labels that fit them."""
    log_p = check_array(
        "log_probabilities", log_probabilities, "(N, T)", lambda a: a.ndim == 2 and a.shape[1] > 1
    ).astype("float64")
    valid = (log_p <= 1e-3).all() and (np.abs(np.exp(log_p).sum(-1) - 1) < 1e-3).all()
    if not valid:
        raise ValueError(
            "`log_probabilities` must be logarithms of probabilities that sum to 1, as a "
            "`DropMaxHead` predicts them. Convert logits with `tf.nn.log_softmax`. "
            f"Received: values from {log_p.min():.4g} to {log_p.max():.4g}"
        )
    return log_p, check_labels("labels", labels, len(log_p), log_p.shape[1])


def check_unit_interval(
    name: str, value: ArrayLike, shape: Sequence[int] | None = None
) -> np.ndarray:
    """Values in [0, 1] in float64. The shape defaults to any of two axes."""
    expected = "(N, T)" if shape is None else str(tuple(shape))
    values = check_array(
        name, value, expected, lambda a: a.ndim == 2 if shape is None else a.shape == tuple(shape)
    ).astype("float64")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"`{name}` must be in [0, 1]. Received: values from {values.min()} to {values.max()}"
        )
    return values


def check_class_names(class_names: Sequence[Any] | None, classes: int) -> list[str]:
    """A string for every class. `None` gives the numbers of the classes."""
    names = [str(name) for name in (range(classes) if class_names is None else class_names)]
    if len(names) != classes:
        raise ValueError(
            f"`class_names` must have a name for each of the {classes} classes. "
            f"Received: {len(names)} names"
        )
    return names
