"""The measures of predictions, from log-probabilities and labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score

from tf_dropmax import ExpectedCalibrationError, NegativeLogLikelihood
from tf_dropmax.calibration import best_temperature


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


def calibrated_measures(
    log_probabilities: np.ndarray, labels: np.ndarray, temperature: float
) -> dict[str, float]:
    """The measures that a temperature changes, by names that start with "calibrated".

    Args:
        log_probabilities, labels: As for `error`.
        temperature: Positive float, by which the log-probabilities are divided.
    """
    log_p = log_softmax(log_probabilities / temperature, axis=-1)
    return {f"calibrated {name}": MEASURES[name](log_p, labels) for name in ("NLL", "ECE %")}


def fitted_temperature(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that `calibrate` would fit, or 1.0 if a prediction is not finite.

    Arguments are as for `error`.
    """
    if not np.isfinite(log_probabilities).all():
        return 1.0  # The run diverged.
    return round(best_temperature(log_probabilities, labels), 4)


def out_of_scope_auroc(known: np.ndarray, out_of_scope: np.ndarray) -> float:
    """How well a score tells examples of the classes from others, in percent. 50 is chance.

    Args:
        known: Array `(N,)`, scores of examples of the classes. They should be higher.
        out_of_scope: Array `(M,)`, scores of examples of no class.

    Returns:
        Float, the area under the ROC curve.
    """
    labels = np.repeat([1, 0], [len(known), len(out_of_scope)])
    return 100 * float(roc_auc_score(labels, np.concatenate([known, out_of_scope])))
