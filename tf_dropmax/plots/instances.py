"""Figures of single examples: which ones to look at, and what the head makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETDOWN
from numpy.typing import ArrayLike

from tf_dropmax.checks import check_positive_int
from tf_dropmax.plots.common import (
    check_class_names,
    check_predictions,
    check_unit_interval,
    draw_heat_map,
    name_classes,
)


def easy_and_hard(
    log_probabilities: ArrayLike, labels: ArrayLike, count: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the examples with the largest and the smallest probability of their label.

    Args:
        log_probabilities: Array, shape `(N, T)`.
        labels: Integer array, shape `(N,)`.
        count: Positive int, the number of easy and of hard examples. At most N are returned.
            Defaults to 4.

    Returns:
        A pair of integer arrays, shape `(count,)`: the indices of the easiest examples, easiest
        first, and of the hardest examples, hardest first.

    Raises:
        ValueError: If shapes do not match, values are not log-probabilities, or `count` is not
            positive.

    Example:

    >>> log_p = np.log([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    >>> easy, hard = plots.easy_and_hard(log_p, [0, 0, 0], count=1)
    >>> easy.tolist(), hard.tolist()
    ([0], [2])
    """
    log_p, labels = check_predictions(log_probabilities, labels)
    count = check_positive_int("count", count)
    order = np.argsort(log_p[np.arange(len(labels)), labels], kind="stable")
    return order[::-1][:count], order[:count]


def examples(
    images: ArrayLike,
    retain_probabilities: ArrayLike,
    log_probabilities: ArrayLike,
    labels: ArrayLike,
    masks: ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Draws images beside their retain probabilities, predictions and masks, as in Figure 4(a-c).

    Each image gets a row of heat maps with a column for every class. A triangle above a heat map
    marks the true class. The name of the true class is to the left of the image.

    Args:
        images: Array, shape `(N, height, width)` or `(N, height, width, 1 or 3)`, floats in
            [0, 1] or uint8. In an image without colours, 0 is white and 1 (uint8: 255) is black.
        retain_probabilities: Array, shape `(N, T)`, from `head.retain_probabilities`.
        log_probabilities: Array, shape `(N, T)`, from `model.predict`.
        labels: Integer array, shape `(N,)`, the true classes.
        masks: `None` or array in [0, 1], shape `(N, S, T)`, S sampled masks for each image. With
            `None`, no masks are drawn. Defaults to `None`.
        class_names: `None` or sequence of T strings. With `None`, classes are numbered. Defaults to
            `None`.

    Returns:
        A `matplotlib.figure.Figure`, N rows.

    Raises:
        ValueError: If shapes do not match, values are not in [0, 1], or predictions are not
            log-probabilities.

    Example:

    >>> rho, log_p = np.array([[0.9, 0.2]]), np.log([[0.8, 0.2]])
    >>> figure = plots.examples(np.zeros((1, 8, 8)), rho, log_p, labels=[0])
    >>> [axes.get_title() for axes in figure.axes[:3]]
    ['', 'retain probability', 'prediction']
    """
    log_p, labels = check_predictions(log_probabilities, labels)
    rows, classes = log_p.shape
    retain = check_unit_interval("retain_probabilities", retain_probabilities, rows, classes)
    images = np.asarray(images)
    images = images / 255 if images.dtype == "uint8" else images
    images = check_unit_interval("images", images, rows, "height", "width", *images.shape[3:4])
    names = check_class_names(class_names, classes)
    columns = {"retain probability": retain[:, None], "prediction": np.exp(log_p)[:, None]}
    height = 0.75
    if masks is not None:
        columns["sampled masks"] = check_unit_interval("masks", masks, rows, "S", classes)
        height = max(height, 0.13 * columns["sampled masks"].shape[1])
    size = 1 + 3.1 * len(columns), 1.1 + height * rows
    figure = Figure(figsize=size, layout="constrained")
    widths = [1, *[3.2] * len(columns)]
    grid = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for row, label in enumerate(labels):
        grid[row, 0].imshow(images[row], cmap="gray_r", vmin=0, vmax=1)
        grid[row, 0].set(xticks=[], yticks=[])
        grid[row, 0].set_ylabel(names[label], rotation=0, ha="right", va="center")
        for axes, values in zip(grid[row, 1:], columns.values(), strict=True):
            drawn = draw_heat_map(axes, values[row], aspect="auto")
            triangle = _mark_class(axes, label)
            axes.set_yticks([])
            name_classes(axes.xaxis, names if row == rows - 1 else [])
    for axes, title in zip(grid[0, 1:], columns, strict=True):
        axes.set_title(title, fontsize=10, pad=9)
    for axes in grid[-1, 1:]:
        axes.set_xlabel("class")
    figure.legend([triangle], ["true class"], loc="outside upper left", frameon=False)
    figure.colorbar(drawn, ax=grid, shrink=min(1, 2.5 / figure.get_figheight()), pad=0.02)
    return figure


def _mark_class(axes: Axes, label: int) -> Line2D:
    transform = axes.get_xaxis_transform()
    (triangle,) = axes.plot(label, 1, "k", marker=CARETDOWN, transform=transform, clip_on=False)
    triangle.set_linestyle("none")
    return triangle
