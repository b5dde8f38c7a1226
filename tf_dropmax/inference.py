"""What a head computes at inference, mode by mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tf_dropmax import functional
from tf_dropmax.checks import check_one_of, check_positive_int, check_temperature
from tf_dropmax.functional.numerics import LIMIT

PREDICT_MODES = ("expected", "sampled", "exact", "softmax")

# `keras.metrics.F1Score` and `FBetaScore` skip entries below 1e-9 in absolute value, so no
# log-probability may be 0. 1 - 2**-24 is the largest float32 below 1. In float64 the bound is the
# smallest power of two that these metrics do not skip.
_LARGEST = {"float32": math.log1p(-(2.0**-24)), "float64": math.log1p(-(2.0**-29))}


class PredictSetting(NamedTuple):
    """How a head predicts.

    Attributes:
        mode: One of `PREDICT_MODES`.
        samples: Number of masks of mode `"sampled"`.
        temperatures: The temperature of the log-probabilities of every mode, in the order of
            `PREDICT_MODES`; see `tf_dropmax.calibrate`.
    """

    mode: str
    samples: int
    temperatures: tuple[float, ...] = (1.0,) * len(PREDICT_MODES)

    @classmethod
    def of_arguments(cls, mode: Any, samples: Any, temperatures: Any) -> PredictSetting:
        """The setting that the arguments of `DropMaxHead` describe.

        Raises:
            ValueError: If an argument is not as `DropMaxHead` documents.
        """
        if temperatures is not None and not isinstance(temperatures, dict):
            raise ValueError(
                "`predict_temperatures` must be a dictionary from predict modes to temperatures. "
                f"Received: predict_temperatures={temperatures!r}"
            )
        given = temperatures or {}
        if not set(given) <= set(PREDICT_MODES):
            raise ValueError(
                f"The keys of `predict_temperatures` must be in {PREDICT_MODES}. "
                f"Received: predict_temperatures={temperatures!r}"
            )
        return cls(
            check_one_of("predict_mode", mode, PREDICT_MODES),
            check_positive_int("predict_samples", samples),
            tuple(
                check_temperature(f"predict_temperatures[{each!r}]", given.get(each, 1.0))
                for each in PREDICT_MODES
            ),
        )

    def changed(self, mode: Any, samples: Any = None) -> PredictSetting:
        """The setting with another mode, and another number of masks unless it is `None`.

        Raises:
            ValueError: If `mode` is not in `PREDICT_MODES` or `samples` is not a positive int.
        """
        mode = check_one_of("mode", mode, PREDICT_MODES)
        if samples is None:
            return self._replace(mode=mode)
        return self._replace(mode=mode, samples=check_positive_int("samples", samples))

    @property
    def temperature(self) -> float:
        """The temperature of the current mode."""
        return self.temperatures[PREDICT_MODES.index(self.mode)]

    def with_temperature(self, temperature: Any) -> PredictSetting:
        """The setting with another temperature of the current mode.

        Raises:
            ValueError: If `temperature` is not a float in [1e-6, 1e6].
        """
        temperature = check_temperature("temperature", temperature)
        pairs = zip(PREDICT_MODES, self.temperatures, strict=True)
        changed = tuple(temperature if mode == self.mode else other for mode, other in pairs)
        return self._replace(temperatures=changed)

    @property
    def traced(self) -> tuple[Any, ...]:
        """What decides whether two settings share their graphs."""
        samples = self.samples if self.mode == "sampled" else None
        return self.mode, samples, self.temperature


def log_probabilities(
    setting: PredictSetting,
    logits: tf.Tensor,
    retain_logits: Callable[[], tf.Tensor],
    seed: Callable[[], tf.Tensor],
) -> tf.Tensor:
    """Log-probabilities of one mode. The graph holds nothing of the other modes.

    Args:
        setting: A `PredictSetting`.
        logits: Tensor, shape `(..., T)`.
        retain_logits: Function that computes the retain logits, shape `(..., T)`.
        seed: Function that takes the next seed, shape `(2,)`, from the stream of the head.

    Returns:
        Tensor of the shape of `logits`. No entry is 0.
    """
    if setting.mode == "softmax":
        log_p = functional.softmax_log_probabilities(logits)
    elif setting.mode == "expected":
        log_p = functional.expected_log_probabilities(logits, retain_logits())
    elif setting.mode == "exact":
        log_p = functional.exact_log_probabilities(logits, retain_logits())
    else:
        log_p = functional.sampled_log_probabilities(
            logits, retain_logits(), setting.samples, _refused_by_converters(seed(), logits)
        )
    if setting.temperature != 1.0:
        scaled = log_p / tf.constant(setting.temperature, log_p.dtype)
        log_p = tf.nn.log_softmax(tf.maximum(scaled, -LIMIT))  # Small temperatures overflow.
    return tf.minimum(log_p, tf.constant(_LARGEST[log_p.dtype.name], log_p.dtype))


def _refused_by_converters(seed: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """The seed, unchanged, by way of a dtype that converters to ONNX and LiteRT refuse.

    These formats have no random numbers that a seed determines. Without this step, tf2onnx writes
    a file that no runtime can load, and Keras writes a LiteRT file that needs operations of
    TensorFlow. With it, both raise.
    """
    # Of one number, which no converter can compute beforehand.
    positive = tf.cast(tf.reshape(logits, [-1])[:1] > 0, tf.int32)
    zero_or_one = tf.cast(positive, tf.qint32)  # tf2onnx refuses qint32.
    infinite = tf.math.is_inf(tf.cast(zero_or_one, tf.float16))  # LiteRT refuses float16 here.
    return seed + tf.cast(tf.reduce_any(infinite), seed.dtype)
