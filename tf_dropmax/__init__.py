"""DropMax, the adaptive stochastic softmax, for Keras 3 on TensorFlow."""

from tf_dropmax import functional
from tf_dropmax.callbacks import DropMaxMonitor, DropMaxPredict, predict_mode
from tf_dropmax.distribute import multi_worker
from tf_dropmax.functional import sparsemax
from tf_dropmax.head import DropMaxHead
from tf_dropmax.losses import DropMaxLoss, SampledSoftmaxLoss, SparsemaxLoss
from tf_dropmax.metrics import (
    BrierScore,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    NonTargetRetainProbability,
    RetainedClasses,
    TargetRetainProbability,
)

__version__ = "0.1.0"

__all__ = [
    "BrierScore",
    "DropMaxHead",
    "DropMaxLoss",
    "DropMaxMonitor",
    "DropMaxPredict",
    "ExpectedCalibrationError",
    "NegativeLogLikelihood",
    "NonTargetRetainProbability",
    "RetainedClasses",
    "SampledSoftmaxLoss",
    "SparsemaxLoss",
    "TargetRetainProbability",
    "functional",
    "multi_worker",
    "predict_mode",
    "sparsemax",
]
