"""The reliability diagram: it compares the accuracy of predictions with their confidence."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from tf_dropmax.metrics import ExpectedCalibrationError
from tf_dropmax.plots.common import check_predictions, new_axes


def reliability_diagram(
    log_probabilities: ArrayLike, labels: ArrayLike, bins: int = 15, axes: Axes | None = None
) -> Axes:
    """Draws the accuracy over the confidence, in bins of equal width.

    The confidence is the largest probability. Bars show the share of the examples in each bin.
    The title gives the expected calibration error. `tf_dropmax.ExpectedCalibrationError` computes
    the bins and the error.

    Args:
        log_probabilities: Array, shape `(N, T)`.
        labels: Integer array, shape `(N,)`.
        bins: Positive int. Defaults to 15.
        axes: `None` or `matplotlib.axes.Axes` to draw into. With `None`, new axes are made.
            Defaults to `None`.

    Returns:
        The axes.

    Raises:
        ValueError: If shapes do not match, values are not log-probabilities, or `bins` is not
            positive.

    Example:

    >>> axes = plots.reliability_diagram(np.log([[0.9, 0.1], [0.6, 0.4]]), [0, 1], bins=2)
    >>> axes.get_title()
    'calibration error 25.0 %'
    """
    log_p, labels = check_predictions(log_probabilities, labels)
    metric = ExpectedCalibrationError(bins)
    error = float(metric(labels, log_p))
    weight, confidence, accuracy = metric.reliability()
    filled, centres = weight > 0, (np.arange(bins) + 0.5) / bins
    axes = axes or new_axes(3.8, 4)
    axes.bar(
        centres,
        weight / weight.sum(),
        1 / bins,
        color="0.85",
        edgecolor="0.6",
        label="share of the examples",
    )
    axes.plot([0, 1], [0, 1], "k:", linewidth=1, label="perfect calibration")
    axes.plot(
        confidence[filled], accuracy[filled], "o-", color="#0072B2", markersize=5, label="accuracy"
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence")
    axes.set_title(f"calibration error {100 * error:.1f} %")
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=4.5,  # In units of the font size: below the label of the axis.
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    return axes
