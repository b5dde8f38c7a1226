"""How figures look: heat maps, colours, markers, and class names along an axis."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

_COLOURS = ("black", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^vPX*<>"
_DASHES = ("-", "--", "-.", ":")


def new_axes(width: float, height: float) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").subplots()


def draw_heat_map(
    axes: Axes, values: np.ndarray, largest: float = 1.0, **options: Any
) -> AxesImage:
    """Draws 0 white and `largest` black."""
    return axes.imshow(values, cmap="Greys", vmin=0, vmax=largest, **options)


def colour_and_marker(index: int) -> dict[str, Any]:
    """Keyword arguments that differ for the first 70 indices."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
    }


def dashes(index: int) -> str:
    return _DASHES[index % len(_DASHES)]


def name_classes(axis: XAxis | YAxis, names: list[str]) -> None:
    """Names up to twenty classes along an axis. Names about ten, evenly spaced, of more."""
    count = len(names)
    ticks = range(count) if count <= 20 else MaxNLocator(10, integer=True).tick_values(0, count - 1)
    shown = [int(k) for k in ticks if k < count]
    axis.set_ticks(shown, [names[k] for k in shown])
    longest = max((len(names[k]) for k in shown), default=0)
    crowded = isinstance(axis, XAxis) and longest * len(shown) > 30
    axis.set_tick_params(labelsize=8, labelrotation=90 if crowded else 0)
