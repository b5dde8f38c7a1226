"""Figures over a plane of two numbers: two logits, or inputs with two features."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike

from tf_dropmax.checks import check_number
from tf_dropmax.functional import exact_log_probabilities, softmax_log_probabilities
from tf_dropmax.plots.common import check_array, check_labels, colour_and_marker, draw_heat_map

_LOGITS = 101  # Grid points along a side of `contours`.
_INPUTS = 200  # Grid points along a side of `decision_boundaries`.


def contours(
    retain_probabilities: ArrayLike = ((0.9, 0.9), (0.5, 0.5), (0.9, 0.4)), limit: float = 5.0
) -> Figure:
    """Draws the probability of the first of two classes over the two logits, as in Figure 2.

    The first panel shows the softmax (2). The other panels show the exact expectation (16) of
    DropMax. If both classes have the same retain probability, the contours move apart: the
    prediction is less certain. If one class has a smaller retain probability, the contours move
    towards that class: it needs a larger logit to win, and may never win.

    Args:
        retain_probabilities: Sequence of pairs of floats in (0, 1), the retain probabilities of
            the first and of the second class. Each pair gets a panel. Defaults to
            `((0.9, 0.9), (0.5, 0.5), (0.9, 0.4))`.
        limit: Positive float. Both logits go from `-limit` to `limit`. Defaults to 5.0.

    Returns:
        A `matplotlib.figure.Figure`, one row of `1 + len(retain_probabilities)` panels.

    Raises:
        ValueError: If a retain probability is not in (0, 1), or `limit` is not positive.

    Example:

    >>> figure = plots.contours([(0.9, 0.2)])
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['softmax', 'masks, retained: 0.9, 0.2']
    """
    pairs = check_array("retain_probabilities", retain_probabilities, "pairs", 2)
    if not ((pairs > 0) & (pairs < 1)).all():
        raise ValueError(
            "`retain_probabilities` must be pairs of numbers between 0 and 1. "
            f"Received: {retain_probabilities!r}"
        )
    limit = check_number("limit", limit, "a positive float", lambda value: 0 < value < np.inf)
    line = np.linspace(-limit, limit, _LOGITS)
    logits = np.stack(np.meshgrid(line, line), axis=-1)
    panels = [("softmax", softmax_log_probabilities(logits))]
    for pair in pairs:
        retain_logits = np.broadcast_to(np.log(pair / (1 - pair)), logits.shape)
        log_p = exact_log_probabilities(logits, retain_logits)
        panels.append((f"masks, retained: {pair[0]:g}, {pair[1]:g}", log_p))
    figure = Figure(figsize=(2.9 * len(panels), 3.1), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, log_p) in zip(grid, panels, strict=True):
        drawn = _draw_contours(axes, line, np.exp(log_p)[..., 0])
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("logit of the first class")
    grid[0].set_ylabel("logit of the second class")
    figure.colorbar(drawn, ax=grid, label="probability of the first class", shrink=0.85)
    return figure


def _draw_contours(axes: Axes, line: np.ndarray, p: np.ndarray) -> AxesImage:
    half_cell = (line[1] - line[0]) / 2
    extent = [line[0] - half_cell, line[-1] + half_cell] * 2
    drawn = draw_heat_map(axes, p, origin="lower", extent=extent, interpolation="bilinear")
    levels = [0.1, 0.3, 0.5, 0.7, 0.9]
    colours = ["black" if level <= 0.5 else "white" for level in levels]
    lines = axes.contour(line, line, p, levels, colors=colours, linewidths=0.8)
    axes.clabel(lines, fmt="%.1f", fontsize=8)
    axes.set(xlim=(line[0], line[-1]), ylim=(line[0], line[-1]))
    return drawn


def decision_boundaries(
    predictors: Mapping[str, Callable[[np.ndarray], ArrayLike]], x: ArrayLike, y: ArrayLike
) -> Figure:
    """Draws which class is predicted where, for inputs with two features, as in Figure 1(b).

    Every class has a shade of grey, and its examples have a colour and a marker. Lines separate
    the classes.

    Args:
        predictors: Dictionary `{title: function}`. A function maps inputs of shape `(N, 2)` to
            log-probabilities, logits or probabilities of shape `(N, T)`, T at least 2, e.g.
            `lambda x: model.predict(x, verbose=0)`. Each function gets a panel.
        x: Array, shape `(N, 2)`, the examples.
        y: Integer array, shape `(N,)`, their classes in [0, T).

    Returns:
        A `matplotlib.figure.Figure`, one row of panels.

    Raises:
        ValueError: If `predictors` is empty, a shape is wrong, or a class is out of range.

    Example:

    >>> x, y = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([0, 1])
    >>> figure = plots.decision_boundaries({"nearest": lambda x: x[:, ::-1]}, x, y)
    >>> len(figure.axes)
    1
    """
    x = check_array("x", x, "N", 2)
    margin = 0.15 * np.maximum(np.ptp(x, axis=0), 1e-3)
    first, second = np.linspace(x.min(0) - margin, x.max(0) + margin, _INPUTS, axis=1)
    inputs = np.stack(np.meshgrid(first, second), axis=-1).reshape(-1, 2)
    inputs = inputs.astype(np.result_type(x, "float32"))
    figure = Figure(figsize=(3.4 * len(predictors), 3.4), layout="constrained")
    grid = figure.subplots(1, len(predictors), sharey=True, squeeze=False)[0]
    for axes, (title, predict) in zip(grid, predictors.items(), strict=True):
        outputs = check_array(f"output of {title}", predict(inputs), len(inputs), "T")
        count = outputs.shape[1]
        if count == 1:
            raise ValueError(f"There must be two classes or more. Received: one from {title!r}")
        y = check_labels("y", y, len(x), count)
        _draw_regions(axes, first, second, outputs.argmax(-1).reshape(_INPUTS, _INPUTS), count)
        for label in range(count):
            style = colour_and_marker(label)
            axes.scatter(
                *x[y == label].T, 28, edgecolors="black", linewidths=0.5, label=label, **style
            )
        axes.set(title=title, xticks=[], yticks=[])
    columns = min(count, 5 * len(predictors))
    figure.set_figheight(3.4 + 0.2 * -(-count // columns))
    figure.legend(
        *axes.get_legend_handles_labels(),
        title="class",
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=1,
        handletextpad=0.3,
        columnspacing=1,
    )
    return figure


def _draw_regions(
    axes: Axes, first: np.ndarray, second: np.ndarray, classes: np.ndarray, count: int
) -> None:
    # Light shades only, so that the markers stand out.
    axes.pcolormesh(
        first, second, classes, cmap="Greys", vmin=-0.5, vmax=3 * count, rasterized=True
    )
    for label in range(count):
        if 0 < (classes == label).mean() < 1:
            axes.contour(first, second, classes == label, [0.5], colors="black", linewidths=1)
