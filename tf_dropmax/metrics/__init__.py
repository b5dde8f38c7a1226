"""Metrics for `compile(metrics=...)`: how good the probabilities are, and what the masks do.

Labels are sparse, one-hot or soft, in the shapes that `DropMaxLoss` takes. For soft labels every
metric is the mean over the classes, weighted by the label. `sample_weight` and Keras masks apply.
There is no `ignore_class`. To ignore an example, give it a valid label and a weight of 0.

While a `DropMaxHead` trains, it returns scores, not log-probabilities. Metrics of probabilities
then have no meaning. Of the values that `fit` reports for them, use only those whose names start
with `val_`.
"""

from tf_dropmax.metrics.calibration_error import ExpectedCalibrationError, Reliability
from tf_dropmax.metrics.probabilities import BrierScore, NegativeLogLikelihood
from tf_dropmax.metrics.retain import (
    NonTargetRetainProbability,
    RetainedClasses,
    TargetRetainProbability,
    retain_statistics,
)

__all__ = [
    "BrierScore",
    "ExpectedCalibrationError",
    "NegativeLogLikelihood",
    "NonTargetRetainProbability",
    "Reliability",
    "RetainedClasses",
    "TargetRetainProbability",
    "retain_statistics",
]
