"""The measures of predictions, from log-probabilities and labels."""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score

from tf_dropmax import ExpectedCalibrationError
from tf_dropmax.calibration import best_temperature

MEASURES = ("error %", "NLL", "ECE %")


def measures_of(log_probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The `MEASURES` by name.

    Args:
        log_probabilities: Array `(N, T)`.
        labels: Integer array `(N,)`.

    Returns:
        Dictionary of the share of wrong predictions in percent; the mean of `-log p(label)`, in
        nats; and the expected calibration error in percent, with 15 bins of equal width.
    """
    log_p = log_probabilities.astype("float64")
    error = np.mean(log_p.argmax(-1) != labels)
    likelihood = np.mean(log_p[np.arange(len(labels)), labels])
    calibration = ExpectedCalibrationError(dtype="float64")(labels, log_p)
    values = (100 * error, -likelihood, 100 * calibration)
    return {name: float(value) for name, value in zip(MEASURES, values, strict=True)}


def calibrated_measures(
    log_probabilities: np.ndarray, labels: np.ndarray, temperature: float
) -> dict[str, float]:
    """The measures that a temperature changes, by names that start with "calibrated".

    Args:
        log_probabilities, labels: As for `measures_of`.
        temperature: Positive float, by which the log-probabilities are divided.
    """
    found = measures_of(log_softmax(log_probabilities / temperature, axis=-1), labels)
    return {f"calibrated {name}": found[name] for name in MEASURES[1:]}


def fitted_temperature(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that `calibrate` would fit, or 1.0 if a prediction is not finite.

    Arguments are as for `measures_of`.
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
