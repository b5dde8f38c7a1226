"""What a head tells about its masks, given features."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from tf_dropmax import functional
from tf_dropmax.checks import check_positive_int
from tf_dropmax.head.branches import BranchedLayer
from tf_dropmax.seeds import derived_seed, next_seed


class InspectedLayer(BranchedLayer):
    """Base class of the head, with what it knows about its masks.

    Args:
        *args, **kwargs: As for `BranchedLayer`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._predict_seeds = keras.random.SeedGenerator(
            derived_seed(self.seed, "prediction masks")
        )
        # Keras tracks the generator. TensorFlow's checkpoints and SavedModels need the variable.
        self._predict_seed_state = self._predict_seeds.state.value

    def _retain_logits(self, features: Any) -> tf.Tensor:
        """Retain logits, shape `(batch, ..., units)`. They are constant in random DropMax."""
        if self.retain_probability is None:
            return self.branch("retain", features)
        constant = math.log(self.retain_probability) - math.log1p(-self.retain_probability)
        shape = tf.concat([tf.shape(features)[:-1], [self.units]], axis=0)
        return tf.fill(shape, tf.constant(constant, self.output_dtype))

    def retain_probabilities(self, features: Any) -> tf.Tensor:
        """Retain probability of every class, eq. (4).

        Args:
            features: Float tensor or array, shape `(batch, ..., d)`, an input of the head.

        Returns:
            Tensor of shape `(batch, ..., units)`, values in [0, 1], in the dtype of the output.

        Raises:
            ValueError: If the features have another last dimension.

        Example:

        >>> head = tf_dropmax.DropMaxHead(3)
        >>> head.retain_probabilities(np.ones((1, 4), "float32")).numpy().tolist()
        [[0.5, 0.5, 0.5]]
        """
        return self(features, output="retain_probabilities")

    def uncertainty(self, features: Any, samples: int = 100) -> functional.Uncertainty:
        """How uncertain a prediction is, and how much of the uncertainty comes from the masks.

        Args:
            features: Float tensor or array, shape `(batch, ..., d)`, an input of the head.
            samples: Positive int, number of masks that are drawn. Defaults to 100.

        Returns:
            A `tf_dropmax.functional.Uncertainty`. It does not depend on the predict mode or its
            temperature.

        Raises:
            ValueError: If the features have another last dimension, or `samples` is not a positive
                int.

        Example:

        >>> head = tf_dropmax.DropMaxHead(3, seed=1)
        >>> result = head.uncertainty(np.ones((2, 4), "float32"))
        >>> result.mutual_information.shape, result.spread.shape
        (TensorShape([2]), TensorShape([2, 3]))
        """
        samples = check_positive_int("samples", samples)
        logits, retain_logits = (self(features, output=o) for o in ("logits", "retain_logits"))
        return functional.uncertainty(
            logits, retain_logits, samples, next_seed(self._predict_seeds)
        )

    def mask_distribution(self, features: Any) -> Any:
        """The distribution of the relaxed training masks, eq. (6).

        It has methods such as `log_prob` and `sample`. The head draws from the same distribution by
        `functional.relaxed_mask_logits`, because the gradient of `RelaxedBernoulli.sample` is NaN
        where a mask is close to 0 or 1. This method imports `tensorflow_probability`.

        Args:
            features: Float tensor or array, shape `(batch, ..., d)`, an input of the head.

        Returns:
            A `tfp.distributions.RelaxedBernoulli` with batch shape `(batch, ..., units)`.

        Raises:
            ValueError: If the head has no relaxed masks, because `retain_probability` is a float
                or `stochastic` is `False`; or if the features have another last dimension.

        Example:

        >>> head = tf_dropmax.DropMaxHead(3)
        >>> head.mask_distribution(np.ones((2, 4), "float32")).sample(seed=1).shape
        TensorShape([2, 3])
        """
        if self.retain_probability is not None or not self.stochastic:
            raise ValueError(
                "A head has relaxed masks if `retain_probability=None` and `stochastic=True`. "
                f"Received: retain_probability={self.retain_probability}, "
                f"stochastic={self.stochastic}"
            )
        # Its import takes longer than that of the rest of this package.
        import tensorflow_probability as tfp

        logits = self(features, output="retain_logits")
        if self.posterior == "label":
            auxiliary_logits = self.branch("auxiliary", features)
            logits = functional.posterior_logits(logits, auxiliary_logits)
        temperature = type(self).temperature.tensor(self, logits.dtype)
        return tfp.distributions.RelaxedBernoulli(temperature, logits=logits)
