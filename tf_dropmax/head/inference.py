"""What a head computes at inference: the settings of prediction, and log-probabilities by mode."""

from __future__ import annotations

from functools import partial
from typing import Any

import tensorflow as tf

from tf_dropmax import functional
from tf_dropmax.checks import check_one_of, check_positive_int, check_temperature
from tf_dropmax.head.inspection import InspectedLayer
from tf_dropmax.head.models import follow_mode
from tf_dropmax.head.settings import CheckedSetting
from tf_dropmax.seeds import next_seed

PREDICT_MODES = ("expected", "sampled", "exact", "softmax")
MAX_TEMPERATURE = 100.0  # of predictions; the smallest is 1 / 100


class PredictingLayer(InspectedLayer):
    """Base class of the head, which predicts and knows nothing of training.

    Args:
        predict_mode, predict_samples: As for `DropMaxHead`.
        *args, **kwargs: As for `BranchedLayer`.
    """

    predict_mode = CheckedSetting(
        partial(check_one_of, choices=PREDICT_MODES),
        'What inference computes: `"expected"`, `"sampled"`, `"exact"` or `"softmax"`.',
    )
    predict_samples = CheckedSetting(
        check_positive_int, 'Number of masks in mode `"sampled"`, a positive int.'
    )

    def __init__(self, predict_mode: str, predict_samples: int, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.predict_mode, self.predict_samples = predict_mode, predict_samples
        self.predict_temperatures = self.add_weight(
            name="predict_temperatures",
            shape=(len(PREDICT_MODES),),
            initializer="ones",
            dtype="float32",
            autocast=False,
            trainable=False,
        )

    @property
    def predict_temperature(self) -> float:
        """Temperature of the log-probabilities of the current mode, a float in [0.01, 100].

        `calibrate` fits it. You can set it at any time.
        """
        return float(self.predict_temperatures.numpy()[PREDICT_MODES.index(self.predict_mode)])

    @predict_temperature.setter
    def predict_temperature(self, value: float) -> None:
        of_modes = self.predict_temperatures.numpy()
        value = check_temperature("predict_temperature", value, MAX_TEMPERATURE)
        of_modes[PREDICT_MODES.index(self.predict_mode)] = value
        self.predict_temperatures.assign(of_modes)

    @property
    def traced_setting(self) -> tuple[str, int | None]:
        """What a graph of a prediction keeps: the mode, and the samples of mode `"sampled"`."""
        return self.predict_mode, self.predict_samples if self.predict_mode == "sampled" else None

    def log_probabilities(self, features: Any) -> tf.Tensor:
        """Log-probabilities of the present mode. A graph holds nothing of the other modes."""
        if not tf.executing_eagerly():
            follow_mode(self)
        mode = self.predict_mode
        temperature = self.predict_temperatures[PREDICT_MODES.index(mode)]
        logits = self.branch("classes", features)
        if mode == "softmax":
            return functional.softmax_log_probabilities(logits, temperature)
        retain_logits = self._retain_logits(features)
        if mode == "expected":
            return functional.expected_log_probabilities(logits, retain_logits, temperature)
        if mode == "exact":
            return functional.exact_log_probabilities(logits, retain_logits, temperature)
        seed = next_seed(self._predict_seeds)
        return functional.sampled_log_probabilities(
            logits, retain_logits, self.predict_samples, seed, temperature
        )

    def get_config(self) -> dict[str, Any]:
        setting = {"predict_mode": self.predict_mode, "predict_samples": self.predict_samples}
        return {**super().get_config(), **setting}
