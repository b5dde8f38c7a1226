"""DropMax, the adaptive stochastic softmax, for Keras 3 on TensorFlow."""

from tf_dropmax import functional
from tf_dropmax.baselines import SampledSoftmaxLoss, SparsemaxLoss, sparsemax
from tf_dropmax.calibration import calibrate
from tf_dropmax.callbacks import DropMaxMonitor, DropMaxPredict
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
from tf_dropmax.modes import predict_mode, set_predict_mode, set_predict_temperature
from tf_dropmax.multi_worker_workaround import multi_worker

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
    "multi_worker",
    "predict_mode",
    "set_predict_mode",
    "set_predict_temperature",
    "sparsemax",
]
