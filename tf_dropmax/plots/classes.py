"""Figures of classes: which classes the head retains, and which it confuses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy.stats import spearmanr

from tf_dropmax.checks import check_positive_int
from tf_dropmax.plots.common import (
    check_class_names,
    check_labels,
    check_predictions,
    check_unit_interval,
    draw_heat_map,
    name_classes,
    new_axes,
)

_FLOOR = 1e-12  # Smaller probabilities count as this value.


def class_averages(
    retain_probabilities: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draws retain probabilities averaged over the examples of each class, as in Figure 4(d).

    Args:
        retain_probabilities: Array, shape `(N, T)`.
        labels: Integer array, shape `(N,)`. The row of a class without examples is hatched.
        class_names: `None` or sequence of T strings. With `None`, classes are numbered. Defaults to
            `None`.
        axes: `None` or `matplotlib.axes.Axes` to draw into. With `None`, new axes are made.
            Defaults to `None`.

    Returns:
        The axes, with a heat map that has a row for each true class.

    Raises:
        ValueError: If shapes do not match, or values are not in [0, 1].

    Example:

    >>> axes = plots.class_averages(np.array([[0.9, 0.2], [0.3, 0.7]]), labels=[0, 1])
    >>> axes.get_images()[0].get_array().tolist()
    [[0.9, 0.2], [0.3, 0.7]]
    """
    retain = check_unit_interval("retain_probabilities", retain_probabilities, "N", "T")
    labels = check_labels("labels", labels, *retain.shape)
    names = check_class_names(class_names, retain.shape[1])
    axes = axes or new_axes(4.4, 3.8)
    _draw_matrix(axes, _means_by_class(retain, labels), names, "mean retain probability")
    return axes


def top_and_bottom(
    retain_probabilities: ArrayLike,
    class_names: Sequence[str] | None = None,
    count: int = 5,
    label: int | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draws the classes with the largest and the smallest retain probability, as in Figure 4(e).

    Args:
        retain_probabilities: Array, shape `(T,)` or `(N, T)`. For shape `(N, T)`, the mean over
            the N examples is drawn.
        class_names: `None` or sequence of T strings. With `None`, classes are numbered. Defaults to
            `None`.
        count: Positive int, the number of classes at the top and at the bottom. All classes are
            drawn if T is at most `2 * count`. Defaults to 5.
        label: `None` or int in [0, T), the true class. Its bar is hatched, if it is drawn. Defaults
            to `None`.
        axes: `None` or `matplotlib.axes.Axes` to draw into. With `None`, new axes are made.
            Defaults to `None`.

    Returns:
        The axes, with a horizontal bar for each class, the largest at the top.

    Raises:
        ValueError: If shapes do not match, values or `label` are out of range, or `count` is not
            positive.

    Example:

    >>> names = ["cat", "dog", "ship", "fox"]
    >>> axes = plots.top_and_bottom([0.9, 0.5, 0.1, 0.7], names, count=1)
    >>> [text.get_text() for text in axes.get_yticklabels()]
    ['cat', 'ship']
    """
    count = check_positive_int("count", count)
    rows = np.atleast_2d(np.asarray(retain_probabilities, "float64"))
    retain = check_unit_interval("retain_probabilities", rows, "N", "T").mean(0)
    names = check_class_names(class_names, len(retain))
    if label is not None and label not in range(len(retain)):
        raise ValueError(f"`label` must be in [0, {len(retain)}). Received: label={label!r}")
    order = np.argsort(-retain, kind="stable")
    hidden = max(0, len(order) - 2 * count)
    shown = np.concatenate([order[:count], order[-count:]]) if hidden else order
    places = np.arange(len(shown)) + (hidden > 0) * (np.arange(len(shown)) >= count)
    axes = axes or new_axes(4, 0.6 + 0.27 * (places[-1] + 1))
    hatches = ["///" if k == label else "" for k in shown]
    axes.barh(places, retain[shown], color="0.75", edgecolor="black", hatch=hatches)
    axes.set(xlim=(0, 1), ylim=(places[-1] + 0.6, -0.6))
    axes.set_yticks(places, [names[k] for k in shown])
    axes.set_xlabel("retain probability" + (" (hatched: true class)" if any(hatches) else ""))
    if hidden:
        axes.text(0.02, count, f"... {hidden} more ...", va="center", fontsize=8)
    return axes


def confusion(
    log_probabilities: ArrayLike,
    labels: ArrayLike,
    retain_probabilities: ArrayLike,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Draws predicted probabilities beside retain probabilities, for pairs of different classes.

    The figure shows whether the head retains the classes that it confuses. The first panel is a
    heat map with a row for each true class. It shows the predicted probability of every other
    class, averaged over the examples of the true class. The second panel shows the retain
    probabilities in the same way. The third panel plots the first two against each other. Its
    title gives their rank correlation. Probabilities below 1e-12 count as 1e-12 there.

    Args:
        log_probabilities: Array, shape `(N, T)`.
        labels: Integer array, shape `(N,)`. The diagonals and the rows of classes without
            examples are hatched.
        retain_probabilities: Array, shape `(N, T)`.
        class_names: `None` or sequence of T strings. With `None`, classes are numbered. Defaults to
            `None`.

    Returns:
        A `matplotlib.figure.Figure`, one row of three panels.

    Raises:
        ValueError: If shapes do not match, values are not log-probabilities, or retain
            probabilities are not in [0, 1].

    Example:

    >>> rho = np.array([[0.9, 0.4, 0.1], [0.3, 0.7, 0.2], [0.2, 0.6, 0.9]])
    >>> figure = plots.confusion(np.log(rho / rho.sum(1, keepdims=True)), [0, 1, 2], rho)
    >>> figure.axes[2].get_title()
    'rank correlation 0.99'
    """
    log_p, labels = check_predictions(log_probabilities, labels)
    retain = check_unit_interval("retain_probabilities", retain_probabilities, *log_p.shape)
    names = check_class_names(class_names, retain.shape[1])
    confused = _means_off_diagonal(np.exp(log_p), labels)
    retained = _means_off_diagonal(retain, labels)
    figure = Figure(figsize=(12, 3.8))
    figure.set_layout_engine("constrained", wspace=0.08)
    first, second, third = figure.subplots(1, 3)
    _draw_matrix(first, confused, names, "mean predicted probability", _largest(confused))
    _draw_matrix(second, retained, names, "mean retain probability", _largest(retained))
    known = np.isfinite(confused)
    _draw_correlation(third, retained[known], np.maximum(confused[known], _FLOOR))
    return figure


def _means_by_class(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean over the rows of each class, shape `(T, T)`, NaN for a class without rows."""
    count = values.shape[1]
    means = np.full((count, count), np.nan)
    for label in np.unique(labels):
        means[label] = values[labels == label].mean(0)
    return means


def _means_off_diagonal(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    means = _means_by_class(values, labels)
    np.fill_diagonal(means, np.nan)
    return means


def _largest(values: np.ndarray) -> float:
    """The value to draw black. It is 1 if all values are zero up to rounding."""
    largest = np.nanmax(values)
    return float(largest) if largest > 1e-6 else 1.0


def _draw_matrix(
    axes: Axes, values: np.ndarray, names: list[str], title: str, largest: float = 1.0
) -> None:
    drawn = draw_heat_map(axes, values, largest)
    name_classes(axes.xaxis, names)
    name_classes(axes.yaxis, names)
    axes.set(title=title, xlabel="class", ylabel="true class")
    if np.isnan(values).any():
        # NaNs are transparent, and zero is white as well.
        axes.patch.set(facecolor="white", edgecolor="0.6", hatch="/////")
        axes.set_xlabel("class (hatched: no value)")
    axes.figure.colorbar(drawn, ax=axes, shrink=0.9)


def _draw_correlation(axes: Axes, retained: np.ndarray, confused: np.ndarray) -> None:
    size = np.clip(5000 / len(retained), 0.5, 16)
    axes.scatter(
        retained,
        confused,
        s=size,
        facecolors="none",
        edgecolors="black",
        linewidths=size / 20,
    )
    varied = np.ptp(retained) > 0 and np.ptp(confused) > 0
    correlation = spearmanr(retained, confused).statistic if varied else np.nan
    axes.set(title=f"rank correlation {correlation:.2f}", yscale="log", box_aspect=1)
    axes.set(xlabel="mean retain probability", ylabel="mean predicted probability")
