"""Figures of training: a measure over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from numpy.typing import ArrayLike

from tf_dropmax.plots.common import check_array, colour_and_marker, dashes


def convergence(
    curves: Mapping[str, Mapping[str, ArrayLike]],
    measures: Sequence[str] = ("train NLL", "test NLL", "test error %"),
) -> Figure:
    """Draws how measures change in training, a line for each method, as in Figure 3.

    A line is the mean over the seeds. The band is the mean plus and minus one standard deviation.
    An axis is logarithmic if all its values are positive. On a logarithmic axis, a band does not
    go below half of the smallest seed's value.

    Args:
        curves: Dictionary `{method: {"step": steps, measure: values, ...}}`. The steps have shape
            `(points,)`, the values `(seeds, points)`. `tf_dropmax.experiments.reports.curves`
            returns such a dictionary.
        measures: Sequence of strings, the measures to draw. Each measure gets a panel. Defaults
            to `("train NLL", "test NLL", "test error %")`.

    Returns:
        A `matplotlib.figure.Figure`, one row of panels.

    Raises:
        ValueError: If the values of a measure do not have one entry per step.
        KeyError: If a method lacks a measure.

    Example:

    >>> curves = {"softmax": {"step": [1, 2, 3], "test NLL": [[0.9, 0.5, 0.4], [0.8, 0.6, 0.4]]}}
    >>> figure = plots.convergence(curves, ["test NLL"])
    >>> figure.axes[0].get_ylabel()
    'test NLL'
    """
    figure = Figure(figsize=(3.6 * len(measures), 3.7), layout="constrained")
    grid = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, measure in zip(grid, measures, strict=True):
        positive = all(np.min(curve[measure], initial=1) > 0 for curve in curves.values())
        for index, (method, curve) in enumerate(curves.items()):
            steps = np.asarray(curve["step"])
            values = check_array(f"{measure} of {method}", curve[measure], "seeds", len(steps))
            mean = values.mean(0)
            spread = values.std(0, ddof=1) if len(values) > 1 else 0
            low = np.maximum(mean - spread, values.min(0) / 2) if positive else mean - spread
            style = colour_and_marker(index)
            axes.fill_between(
                steps, low, mean + spread, color=style["color"], alpha=0.15, linewidth=0
            )
            axes.plot(
                steps,
                mean,
                label=method,
                linestyle=dashes(index),
                markersize=5,
                markevery=(index, max(1, len(mean) // 6)),
                **style,
            )
        axes.set(xlabel="training step", ylabel=measure)
        if positive:
            _make_logarithmic(axes, "y", (1, 2, 3, 5))
        if all(np.min(curve["step"]) > 0 for curve in curves.values()):
            _make_logarithmic(axes, "x", (1, 3))
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    figure.legend(
        *axes.get_legend_handles_labels(),
        title="mean over the seeds ± one standard deviation",
        title_fontsize="small",
        loc="outside upper center",
        ncols=min(len(curves), 2 * len(measures)),
        frameon=False,
    )
    return figure


def _make_logarithmic(axes: Axes, which: str, digits: Sequence[int]) -> None:
    """Labels the numbers that start with one of the digits, without exponents."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
