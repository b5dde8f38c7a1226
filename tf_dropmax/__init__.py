"""DropMax, the adaptive stochastic softmax, for Keras 3 on TensorFlow."""

from tf_dropmax import functional
from tf_dropmax.baselines import SampledSoftmaxLoss, SparsemaxLoss, sparsemax
from tf_dropmax.calibration import calibrate, set_predict_temperature
from tf_dropmax.head import DropMaxHead
from tf_dropmax.losses import DropMaxLoss
from tf_dropmax.metrics import (
    BrierScore,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    NonTargetRetainProbability,
    RetainedClasses,
    TargetRetainProbability,
)
from tf_dropmax.modes import DropMaxPredict, predict_mode, set_predict_mode
from tf_dropmax.monitor import DropMaxMonitor

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
    "calibrate",
    "functional",
    "predict_mode",
    "set_predict_mode",
    "set_predict_temperature",
    "sparsemax",
]
