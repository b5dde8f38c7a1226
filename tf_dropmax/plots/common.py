"""What the figures share: checks of their arrays, heat maps, colours, and class names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

_COLOURS = ("black", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vPX*<>"
_DASHES = ("-", "--", "-.", ":")


def check_array(name: str, value: ArrayLike, *shape: int | str) -> np.ndarray:
    """An array. A string in `shape` stands for any number, at least 1."""
    array = np.asarray(value)
    pairs = zip(array.shape, shape, strict=False)
    fits = all(size == expected or isinstance(expected, str) for size, expected in pairs)
    if array.ndim != len(shape) or not fits or array.size == 0:
        expected = str(shape).replace("'", "")
        raise ValueError(
            f"`{name}` must have shape {expected} and at least one value. "
            f"Received: shape {array.shape}"
        )
    return array


def check_labels(name: str, value: ArrayLike, count: int, classes: int) -> np.ndarray:
    labels = check_array(name, value, count)
    low, high = labels.min(), labels.max()
    if labels.dtype.kind not in "iu" or low < 0 or high >= classes:
        raise ValueError(
            f"`{name}` must be integers in [0, {classes}). "
            f"Received: dtype {labels.dtype}, labels from {low} to {high}"
        )
    return labels


def check_predictions(p: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities in float64, and labels that fit them."""
    log_p = check_array("log_probabilities", p, "N", "T").astype("float64")
    if log_p.shape[1] == 1:
        raise ValueError(f"There must be two classes or more. Received: shape {log_p.shape}")
    if not ((log_p <= 1e-3).all() and (np.abs(np.exp(log_p).sum(-1) - 1) < 1e-3).all()):
        raise ValueError(
            "`log_probabilities` must be logarithms of probabilities that sum to 1, as a "
            "`DropMaxHead` predicts them. Convert logits with `tf.nn.log_softmax`. "
            f"Received: values from {log_p.min():.4g} to {log_p.max():.4g}"
        )
    return log_p, check_labels("labels", labels, *log_p.shape)


def check_unit_interval(name: str, value: ArrayLike, *shape: int | str) -> np.ndarray:
    values = check_array(name, value, *shape).astype("float64")
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


def new_axes(width: float, height: float) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").subplots()


def draw_heat_map(
    axes: Axes, values: np.ndarray, largest: float = 1.0, **options: Any
) -> AxesImage:
    """Draws 0 white and `largest` black."""
    return axes.imshow(values, cmap="Greys", vmin=0, vmax=largest, **options)


def colour_and_marker(index: int) -> dict[str, Any]:
    """Keyword arguments that differ for the first 70 indices."""
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    return {"color": colour, "marker": marker}


def dashes(index: int) -> str:
    return _DASHES[index % len(_DASHES)]


def name_classes(axis: XAxis | YAxis, names: list[str]) -> None:
    """Names every class if there are at most twenty, otherwise about ten, evenly spaced."""
    count = len(names)
    ticks = range(count) if count <= 20 else MaxNLocator(10, integer=True).tick_values(0, count - 1)
    shown = [int(k) for k in ticks if k < count]
    axis.set_ticks(shown, [names[k] for k in shown])
    longest = max((len(names[k]) for k in shown), default=0)
    crowded = isinstance(axis, XAxis) and longest * len(shown) > 30
    axis.set_tick_params(labelsize=8, labelrotation=90 if crowded else 0)
