"""Methods that report on the masks of a head: probabilities, uncertainty, distribution."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tf_dropmax import functional
from tf_dropmax.branches import BranchedLayer
from tf_dropmax.checks import check_positive_int
from tf_dropmax.seeds import next_seed

if TYPE_CHECKING:
    from tensorflow_probability.python.distributions import RelaxedBernoulli


class InspectableHead(BranchedLayer):
    """The methods of `DropMaxHead` that explain its predictions."""

    def _retain_logits(self, features: Any, logits: tf.Tensor) -> tf.Tensor:
        if self.retain_probability is None:
            return self._product(features, "retain")
        constant = math.log(self.retain_probability) - math.log1p(-self.retain_probability)
        return tf.fill(tf.shape(logits), tf.constant(constant, logits.dtype))

    def retain_probabilities(self, features: Any) -> tf.Tensor:
        """Retain probability of every class, eq. (4).

        Args:
            features: Float tensor or array, shape `(batch, ..., d)`, an input of the head.

        Returns:
            Tensor of shape `(batch, ..., units)`, values in [0, 1], in the dtype of the output.

        Raises:
            ValueError: If the features are not floating point or have another last dimension.

        Example:

        >>> head = tf_dropmax.DropMaxHead(3, retain_kernel_initializer="zeros")
        >>> head.retain_probabilities(np.ones((1, 4), "float32")).numpy().tolist()
        [[0.5, 0.5, 0.5]]
        """
        features = self._checked(features)
        if self.retain_probability is None:
            return tf.sigmoid(self._product(features, "retain"))
        shape = tf.concat([tf.shape(features)[:-1], [self.units]], axis=0)
        return tf.fill(shape, tf.constant(self.retain_probability, self._output_dtype))

    def uncertainty(self, features: Any, samples: int = 100) -> functional.Uncertainty:
        """How uncertain a prediction is, and how much of the uncertainty comes from the masks.

        Args:
            features: Float tensor or array, shape `(batch, ..., d)`, an input of the head.
            samples: Positive int, number of masks that are drawn. Defaults to 100.

        Returns:
            A `tf_dropmax.functional.Uncertainty`. It does not depend on the predict mode or its
            temperature.

        Raises:
            ValueError: If the features are not floating point or have another last dimension, or
                `samples` is not a positive int.

        Example:

        >>> head = tf_dropmax.DropMaxHead(3, seed=1)
        >>> result = head.uncertainty(np.ones((2, 4), "float32"))
        >>> result.mutual_information.shape, result.spread.shape
        (TensorShape([2]), TensorShape([2, 3]))
        """
        samples = check_positive_int("samples", samples)
        features = self._checked(features)
        logits = self._product(features, "classes")
        retain_logits = self._retain_logits(features, logits)
        seed = next_seed(self._predict_seeds)
        return functional.uncertainty(logits, retain_logits, samples, seed)

    def mask_distribution(self, features: Any) -> RelaxedBernoulli:
        """The distribution of the relaxed training masks, eq. (6).

        It has methods such as `log_prob` and `sample`. The head draws from the same distribution by
        `functional.relaxed_masks`, because the gradient of `RelaxedBernoulli.sample` is NaN where
        a mask is close to 0 or 1. This method imports `tensorflow_probability`.

        Args:
            features: Float tensor or array, shape `(batch, ..., d)`, an input of the head.

        Returns:
            A `tfp.distributions.RelaxedBernoulli` with batch shape `(batch, ..., units)`.

        Raises:
            ValueError: If the head has no relaxed masks, because `retain_probability` is a float
                or `stochastic` is `False`; or if the features are not floating point or have
                another last dimension.

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

        features = self._checked(features)
        logits = self._product(features, "retain")
        if self.posterior == "label":
            auxiliary_logits = self._product(features, "auxiliary")
            logits = functional.posterior_logits(logits, auxiliary_logits)
        temperature = type(self).temperature.tensor(self, logits.dtype)
        return tfp.distributions.RelaxedBernoulli(temperature, logits=logits)
