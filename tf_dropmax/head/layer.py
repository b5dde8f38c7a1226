"""DropMaxHead: the layer that replaces the logits layer of a classifier."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax import functional
from tf_dropmax.checks import (
    check_boolean,
    check_fraction,
    check_one_of,
    check_optional_int,
    check_positive_int,
    check_temperature,
    check_weight,
)
from tf_dropmax.head.branches import OUTPUTS, arguments_of
from tf_dropmax.head.inference import PredictingLayer
from tf_dropmax.head.models import check_loss
from tf_dropmax.head.settings import TrainingSetting
from tf_dropmax.head.variants import TrainingStep, Variant, class_scale, variant_of
from tf_dropmax.seeds import derived_seed, next_seed

POSTERIORS = ("prior", "label")


@keras.saving.register_keras_serializable("tf_dropmax")
class DropMaxHead(PredictingLayer):
    """Classifier head with adaptive stochastic softmax (DropMax).

    It replaces the logits layer `Dense(units)`. Compile the model with `DropMaxLoss`.

        logits         o = features @ kernel + bias
        retain logits  r = features @ retain kernel + retain bias
        retain probability  rho = sigmoid(r)                                            (4)

    In training, a relaxed Bernoulli mask (6) keeps each class in the softmax with probability
    `rho`. The target is always kept. The layer gets no labels. It returns one score per class,
    computed as if that class were the label. Scores are not log-probabilities. `DropMaxLoss` picks
    the score of the label. The layer adds the entropy term `-entropy_weight * mean(sum_t H(rho_t))`
    by `add_loss`. After the warm-up, the sum of both is the objective (15) with the opposite sign.
    The entropy term is negative, so a negative training loss is normal.

    At inference the layer returns log-probabilities: their `exp` sums to 1. None of them is 0,
    because some Keras metrics skip entries that are 0. The output is float64 under the dtype policy
    `"float64"`, and float32 under every other policy.

    The logits and the retain logits come from `keras.layers.Dense` layers. They are in the
    dictionary `branches`, with the keys `"classes"`, `"retain"` and `"auxiliary"`.

    As with every `add_loss`, `sample_weight`, `class_weight`, `loss_weights` and the reduction of
    the loss do not apply to the entropy term. Call the head on sequences and images directly:
    `TimeDistributed` would add the entropy term once per step.

    Args:
        units: Int of 2 or more, the number of classes T.
        posterior: `"prior"` or `"label"`, the distribution of the training masks. `"prior"` are the
            retain probabilities (9), as in the ICLR 2018 submission. `"label"` is the posterior of
            the NeurIPS 2018 paper: an auxiliary classifier on the same features learns to predict
            the label, and its logits are added to the retain logits; see
            `functional.label_scores_and_entropy`. Predictions do not use the auxiliary classifier.
            Defaults to `"prior"`.
        entropy_weight: `None` or float in [0, 1e6], the paper's lambda, weight of the entropy
            regulariser (14). Larger values push retain probabilities towards 1/2. The regulariser
            is a sum over classes. With many classes, a weight of 1 can prevent a network from
            learning. `None` is `min(1, 30 / units)`. Defaults to `None`.
        warmup_steps: `None` or float in [0, 1e6], number of training steps (more exactly: calls in
            training) in which two weights rise from 0: that of the KL divergence to 1, and that of
            the regulariser to `entropy_weight`. The head then learns from the cross entropy first.
            With `posterior="label"` and many classes, a warm-up makes all masks drop every class.
            0 is as in the paper. `None` is 0 with `posterior="label"`, and 100 otherwise. Defaults
            to `None`.
        retain_probability: `None` or float in (0, 1). `None` is adaptive DropMax, which learns the
            retain probability as a function of the features. A float is random DropMax: hard masks
            keep each class with this probability, and always keep the target. Random DropMax has no
            retain branch, no KL divergence and no entropy term. Defaults to `None`.
        stochastic: Bool. `False` replaces the masks by their means. With `posterior="prior"` this
            is deterministic attention: the head trains on eq. (18) with the entropy term. There is
            no KL divergence, and the mask of the target is replaced by its mean too. With
            `posterior="label"` the mask of the target stays 1. Defaults to `True`.
        temperature: Float in [1e-6, 1e6], temperature of the relaxed masks (6). Small values make
            harder masks. Defaults to 0.1, as in the paper.
        auxiliary_weight: `None` or float in [0, 1e6], weight of the loss of the auxiliary
            classifier, which is a sum over classes. 1.0 is as published. `None` is
            `min(0.1, 3 / units)`. Defaults to `None`.
        predict_mode: `"expected"` (18), `"sampled"` (17), `"exact"` (16) or `"softmax"` (2), what
            inference computes. You can set it at any time. Defaults to `"expected"`.
        predict_samples: Positive int, number of masks in mode `"sampled"`. You can set it at any
            time. Defaults to 30.
        retain: `None` or a dictionary of arguments of `keras.layers.Dense` for the retain branch
            and the auxiliary classifier, such as `{"kernel_regularizer": "l2"}`. They have the
            `use_bias` and the dtype policy of the logits unless you give others. Their kernels
            start at zero, so that the features learn from the logits first. The paper's start
            is `{"kernel_initializer": "glorot_uniform"}` with `warmup_steps=0`. Defaults to
            `None`.
        seed: `None` or int. Seeds the masks, and the initializers of this layer that have no seed
            of their own. With `None`, every layer gets a new seed. Defaults to `None`.
        **kwargs: Arguments of `keras.layers.Dense` for the logits, such as `use_bias` and
            `kernel_regularizer`; and `name`, `dtype`, `trainable` and `activity_regularizer`, as
            for every layer.

    Input shape: `(batch, ..., d)`, two or more dimensions, the last one known.

    Output shape: `(batch, ..., units)`.

    Raises:
        ValueError, TypeError: If an argument is not as above. In training: if every loss of the
            model is one of Keras.

    Example:

    >>> inputs, hidden = keras.Input((20,)), keras.layers.Dense(32, "relu")
    >>> model = keras.Sequential([inputs, hidden, tf_dropmax.DropMaxHead(10)])
    >>> model.compile("adam", tf_dropmax.DropMaxLoss(), metrics=["accuracy"])
    >>> x, y = np.random.default_rng(0).normal(size=(64, 20)), np.arange(64) % 10
    >>> history = model.fit(x, y, verbose=0)
    >>> probabilities = np.exp(model.predict(x, verbose=0))
    >>> probabilities.shape
    (64, 10)

    References:
        Lee et al., DropMax: Adaptive Stochastic Softmax, ICLR 2018 submission (equation numbers);
        DropMax: Adaptive Variational Softmax, NeurIPS 2018, arXiv:1712.07834.
    """

    entropy_weight = TrainingSetting(
        check_weight, "Weight of the entropy regulariser (14), the paper's lambda, a float."
    )
    warmup_steps = TrainingSetting(
        check_weight,
        "Training steps in which the weights of KL divergence and regulariser rise, a float.",
    )
    temperature = TrainingSetting(
        check_temperature, "Temperature of the relaxed masks (6), a float."
    )
    auxiliary_weight = TrainingSetting(
        check_weight, "Weight of the loss of the auxiliary classifier, a float."
    )

    def __init__(
        self,
        units: int,
        *,
        posterior: str = "prior",
        entropy_weight: float | None = None,
        warmup_steps: float | None = None,
        retain_probability: float | None = None,
        stochastic: bool = True,
        temperature: float = 0.1,
        auxiliary_weight: float | None = None,
        predict_mode: str = "expected",
        predict_samples: int = 30,
        retain: dict[str, Any] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        if retain_probability is not None:
            retain_probability = check_fraction("retain_probability", retain_probability)
        check_boolean("stochastic", stochastic)
        check_one_of("posterior", posterior, POSTERIORS)
        variant = self._make_variant(retain_probability, stochastic, posterior)
        units, seed = check_positive_int("units", units, least=2), check_optional_int("seed", seed)
        super().__init__(
            predict_mode, predict_samples, units, variant.branches, seed, retain, **kwargs
        )
        self.variant, self.posterior = variant, posterior
        self.retain_probability, self.stochastic = retain_probability, bool(stochastic)
        self.temperature = temperature
        self.warmup_steps = variant.warmup_steps if warmup_steps is None else warmup_steps
        scale = class_scale(units)
        self.entropy_weight = scale if entropy_weight is None else entropy_weight
        self.auxiliary_weight = 0.1 * scale if auxiliary_weight is None else auxiliary_weight
        # Not the stream of prediction masks, so that a prediction never changes the training.
        self._train_seeds = keras.random.SeedGenerator(derived_seed(seed, "training masks"))
        # Keras tracks the generator. TensorFlow's checkpoints and SavedModels need the variable.
        self._train_seed_state = self._train_seeds.state.value

    @classmethod
    def from_dense(cls, dense: keras.layers.Dense, **kwargs: Any) -> DropMaxHead:
        """A built head that starts from a copy of the weights of a trained `Dense` layer.

        Its branch `"classes"` has the initializers, regularizers, constraints and dtype policy of
        `dense`, unless you pass others. With the default `retain` and in mode `"expected"`, the
        head predicts what the softmax of `dense` did.

        Args:
            dense: A built `keras.layers.Dense` with activation `"linear"` or `"softmax"`, not
                quantized. It stays unchanged.
            **kwargs: Arguments of `DropMaxHead`, except `units`.

        Returns:
            A built `DropMaxHead`.

        Raises:
            TypeError, ValueError: If `dense` is not as above.

        Example:

        >>> dense = keras.layers.Dense(3)
        >>> features = np.ones((2, 4), "float32")
        >>> logits = dense(features)
        >>> head = tf_dropmax.DropMaxHead.from_dense(dense)
        >>> bool(np.allclose(head(features), tf.nn.log_softmax(logits), atol=1e-6))
        True
        """
        if not isinstance(dense, keras.layers.Dense):
            raise TypeError(f"`dense` must be a `keras.layers.Dense`. Received: dense={dense!r}")
        linear = dense.activation in (keras.activations.linear, keras.activations.softmax)
        if not dense.built or dense.quantization_mode is not None or not linear:
            activation = keras.activations.serialize(dense.activation)
            raise ValueError(
                "`dense` must be built, not quantized, and have activation 'linear' or 'softmax'. "
                f"Received: built={dense.built}, quantization_mode={dense.quantization_mode!r}, "
                f"activation={activation!r}"
            )
        head = cls(dense.units, **{**arguments_of(dense), **kwargs})
        head.build((None, dense.kernel.shape[0]))
        head.branches["classes"].set_weights(dense.get_weights())
        return head

    def _make_variant(
        self, retain_probability: float | None, stochastic: bool, posterior: str
    ) -> Variant:
        return variant_of(retain_probability, stochastic, posterior)

    def call(
        self, inputs: Any, training: bool = False, mask: Any = None, *, output: str = "classes"
    ) -> tf.Tensor:
        """Scores in training, log-probabilities at inference.

        Args:
            inputs: Float tensor, shape `(batch, ..., d)`.
            training: Bool. Defaults to `False`.
            mask: `None` or bool tensor, shape `(batch, ...)`, the Keras mask. The entropy term
                ignores positions where it is `False`. Defaults to `None`.
            output: `"classes"`, `"logits"`, `"retain_logits"` or `"retain_probabilities"` (4). The
                last three are the same in training and at inference. To make them an output of the
                model, call the same layer a second time. Such a call adds no entropy term. Keras
                applies an `activity_regularizer` to every call. Defaults to `"classes"`.

        Returns:
            Tensor of shape `(batch, ..., units)`, float32 (float64 under the policy `"float64"`).

        Raises:
            ValueError: If the inputs have another last dimension, or `output` is not as above.
        """
        check_one_of("output", output, OUTPUTS)
        if output == "logits":
            return self.branch("classes", inputs)
        if output == "retain_logits":
            return self._retain_logits(inputs)
        if output == "retain_probabilities":
            return tf.sigmoid(self._retain_logits(inputs))
        return self._scores(inputs, mask) if training else self.log_probabilities(inputs)

    def _scores(self, features: Any, mask: Any) -> tf.Tensor:
        check_loss()
        logits = self.branch("classes", features)

        seed = next_seed(self._train_seeds)  # Its second number counts the steps.

        def uniform():
            return functional.uniform_draws(tf.shape(logits), seed, logits.dtype)

        settings = {
            name: getattr(DropMaxHead, name).tensor(self, logits.dtype)
            for name in ("entropy_weight", "temperature", "auxiliary_weight")
        }
        warmup = DropMaxHead.warmup_steps.tensor(self, logits.dtype)
        ahead = tf.maximum(warmup - tf.cast(seed[1], logits.dtype), 0)
        settings["kl_weight"] = 1 - tf.math.divide_no_nan(ahead, warmup)
        settings["entropy_weight"] *= settings["kl_weight"]
        step = TrainingStep(logits, lambda name: self.branch(name, features), uniform, **settings)
        scores, entropy = self.variant.scores_and_entropy(step)
        if entropy is not None:
            term = -step.entropy_weight * _masked_mean(entropy, mask)
            self.add_loss(tf.cast(term, keras.config.floatx()))
        return scores

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        # The position in the stream of training masks, from which a resumed training goes on.
        store["steps"], store["units"] = self._train_seeds.state.numpy()[1], self.units

    def load_own_variables(self, store: Any) -> None:
        stored = {key: store[key] for key in store.keys()}  # noqa: SIM118 (it is no mapping)
        steps = stored.pop("steps", None)  # Files that were not written by this layer have none.
        if int(np.asarray(stored.pop("units", self.units))) != self.units:
            return  # With `skip_mismatch`, a head with other classes starts anew.
        super().load_own_variables(stored)
        if steps is not None:
            seed = self._train_seeds.state.numpy()[0]
            self._train_seeds.state.assign([seed, int(np.asarray(steps))])

    def get_config(self) -> dict[str, Any]:
        names = (
            "posterior",
            "entropy_weight",
            "warmup_steps",
            "retain_probability",
            "stochastic",
            "temperature",
            "auxiliary_weight",
        )
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _masked_mean(values: tf.Tensor, mask: Any) -> tf.Tensor:
    """Mean of `values` where `mask` is true, as Keras averages a masked loss, or 0."""
    weights = tf.ones_like(values) if mask is None else tf.cast(mask, values.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(values * weights), tf.reduce_sum(weights))
