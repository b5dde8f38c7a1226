"""What is measured of predictions, from log-probabilities `(N, T)` and labels `(N,)`."""

import numpy as np


def error(log_probabilities, labels):
    """Share of wrong predictions, in percent."""
    return 100 * float(np.mean(log_probabilities.argmax(-1) != labels))


def negative_log_likelihood(log_probabilities, labels):
    """Mean of `-log p(label)`, in nats."""
    return -float(np.mean(log_probabilities[np.arange(len(labels)), labels], dtype="float64"))


def calibration_error(log_probabilities, labels, bins=15):
    """Expected calibration error in percent, equal-width bins: mean of |confidence - accuracy|, weighted by bin size."""
    confidence = np.exp(log_probabilities.max(-1).astype("float64"))
    right = log_probabilities.argmax(-1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(np.sum(confidence[index == b]) - np.sum(right[index == b])) for b in range(bins)]
    return 100 * float(np.sum(gaps)) / len(labels)


MEASURES = {"error %": error, "NLL": negative_log_likelihood, "ECE %": calibration_error}
