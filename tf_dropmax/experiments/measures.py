"""The measures of predictions, from log-probabilities and labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tf_dropmax import ExpectedCalibrationError, NegativeLogLikelihood


def error(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of wrong predictions, in percent.

    Args:
        log_probabilities: Array `(N, T)`.
        labels: Integer array `(N,)`.

    Returns:
        Float.
    """
    return 100 * float(np.mean(log_probabilities.argmax(-1) != labels))


def negative_log_likelihood(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean of `-log p(label)`, in nats. Arguments and result are as for `error`."""
    return _in_float64(NegativeLogLikelihood, log_probabilities, labels)


def calibration_error(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error in percent, 15 bins of equal width. Arguments as for `error`."""
    return 100 * _in_float64(ExpectedCalibrationError, log_probabilities, labels)


def _in_float64(metric: Callable, log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(metric(dtype="float64")(labels, log_probabilities.astype("float64")))


MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "error %": error,
    "NLL": negative_log_likelihood,
    "ECE %": calibration_error,
}


def measures_of(log_probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """All `MEASURES` by name. Arguments are as for `error`."""
    return {name: measure(log_probabilities, labels) for name, measure in MEASURES.items()}
