"""DropMaxHead: the layer that replaces the logits layer of a classifier."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax import functional
from tf_dropmax.branches import KINDS, BranchedLayer
from tf_dropmax.checks import (
    check_boolean,
    check_one_of,
    check_positive_int,
    check_probability,
    check_seed,
    check_temperature,
    check_weight,
)
from tf_dropmax.inference import PREDICT_MODES, PredictSetting, log_probabilities
from tf_dropmax.keras_internals import traced_layer
from tf_dropmax.objectives import (
    Objective,
    TrainingStep,
    default_auxiliary_weight,
    default_entropy_weight,
    objective_of,
)
from tf_dropmax.seeds import derived_seed, next_seed
from tf_dropmax.settings import PredictAttribute, TrainingSetting

if TYPE_CHECKING:
    from tensorflow_probability.python.distributions import RelaxedBernoulli
    from typing_extensions import Self

POSTERIORS = ("prior", "label")
_FIXED = ("units", "use_bias", "seed", "retain_probability", "stochastic", "posterior")
OUTPUTS = ("classes", "retain_probabilities", "logits")
# Where a layer keeps the heads that were traced in it. Neither Keras nor TensorFlow tracks it.
_TRACED = "_dropmax_traced_heads"


@keras.saving.register_keras_serializable("tf_dropmax")
class DropMaxHead(BranchedLayer):
    """Classifier head with adaptive stochastic softmax (DropMax).

    It replaces the logits layer `Dense(units)`. Compile the model with `DropMaxLoss`.

        logits         o = features @ kernel + bias
        retain logits  r = features @ retain_kernel + retain_bias
        retain probability  rho = sigmoid(r)                                            (4)

    In training, a relaxed Bernoulli mask (6) keeps each class in the softmax with probability
    `rho`. The target is always kept. The layer gets no labels. It returns one score per class,
    computed as if that class were the label. Scores are not log-probabilities. `DropMaxLoss` picks
    the score of the label. The layer adds the entropy term `-entropy_weight * mean(sum_t H(rho_t))`
    by `add_loss`. The sum of both is the loss of the paper, the objective (15) with the opposite
    sign. The entropy term is negative, so a negative training loss is normal.

    At inference the layer returns log-probabilities: their `exp` sums to 1. None of them is 0,
    because some Keras metrics skip entries that are 0. The largest is `log(1 - 2**-24)` in float32
    and `log(1 - 2**-29)` in float64. The output is float64 under the dtype policy `"float64"`, and
    float32 under every other policy. To get probabilities from a trained model, put
    `keras.layers.Softmax()` on top.

    As with every `add_loss` in Keras, `sample_weight`, `class_weight`, `loss_weights` and the
    reduction of the loss do not apply to the entropy term. Call the head on sequences and images
    directly: inside `TimeDistributed` the entropy term is added once per step.

    Args:
        units: Positive int, the number of classes T.
        retain_probability: `None` or float in (0, 1). `None` is adaptive DropMax, which learns the
            retain probability as a function of the features. A float is random DropMax: hard masks
            keep each class with this probability, and always keep the target. Random DropMax has no
            retain branch, no KL divergence and no entropy term. Defaults to `None`.
        stochastic: Bool. `False` replaces the masks by their means. With `posterior="prior"` this
            is deterministic attention: the head trains on eq. (18) with the entropy term. There is
            no KL divergence, and the mask of the target is replaced by its mean too. With
            `posterior="label"` the mask of the target stays 1. Defaults to `True`.
        temperature: Float in [1e-6, 1e6], temperature of the relaxed masks (6). Small values are
            closer to hard masks. Defaults to 0.1, as in the paper.
        entropy_weight: `None` or float in [0, 1e6], the paper's lambda, weight of the entropy
            regulariser (14). Larger values push retain probabilities towards 1/2. The regulariser
            is a sum over classes. With many classes, a weight of 1 can prevent a network from
            learning. `None` is `min(1, 30 / units)`. Defaults to `None`.
        use_bias: Bool, whether the branches have a bias. Defaults to `True`.
        kernel_initializer, retain_kernel_initializer: Initializers. Default to
            `"glorot_uniform"`.
        bias_initializer, retain_bias_initializer: Initializers. Default to `"zeros"`.
        kernel_regularizer, bias_regularizer, retain_kernel_regularizer, retain_bias_regularizer:
            Regularizers. Default to `None`.
        kernel_constraint, bias_constraint, retain_kernel_constraint, retain_bias_constraint:
            Constraints. Default to `None`.
        predict_mode: `"expected"` (18), `"sampled"` (17), `"exact"` (16) or `"softmax"` (2), what
            the head computes at inference. To change it later, use `DropMaxPredict`, `predict_mode`
            or `set_predict_mode`. Defaults to `"expected"`.
        predict_samples: Positive int, number of masks in mode `"sampled"`. Defaults to 30.
        seed: `None` or int. Seeds the masks, and the initializers of this layer that have no seed
            of their own. Global seeds stay unchanged. With `None`, every layer gets a new seed.
            Defaults to `None`.
        posterior: `"prior"` or `"label"`, the distribution of the training masks. `"prior"` are the
            retain probabilities (9), as in the ICLR 2018 submission. `"label"` is the posterior of
            the NeurIPS 2018 paper: an auxiliary classifier on the same features learns to predict
            the label, and its logits are added to the retain logits; see
            `functional.label_scores_and_entropy`. It adds the weights `auxiliary_kernel` and
            `auxiliary_bias`, with the regularizers and constraints of the retain branch.
            Predictions do not use them. Defaults to `"prior"`.
        auxiliary_weight: `None` or float in [0, 1e6], weight of the loss of the auxiliary
            classifier, which is a sum over classes. 1.0 is as published. `None` is
            `min(0.1, 3 / units)`. Defaults to `None`.
        predict_temperatures: `None` or a dictionary from predict modes to floats in [1e-6, 1e6],
            the temperatures by which log-probabilities are divided at inference. `calibrate` fits
            them. A mode that is missing has the temperature 1.0. Defaults to `None`.
        **kwargs: `name`, `dtype`, `trainable` and `activity_regularizer`, as for every layer.

    Input shape:
        `(batch, ..., d)`, floating point, two or more dimensions, the last one known.

    Output shape:
        `(batch, ..., units)`.

    Raises:
        ValueError, TypeError: If an argument is not as above, or the inputs are not floating
            point, or their last dimension is unknown.

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
        Lee et al., DropMax: Adaptive Stochastic Softmax, ICLR 2018 submission (the equation
        numbers); DropMax: Adaptive Variational Softmax, NeurIPS 2018, arXiv:1712.07834.
    """

    entropy_weight = TrainingSetting(
        check_weight, "Weight of the entropy regulariser (14), the paper's lambda, a float."
    )
    temperature = TrainingSetting(
        check_temperature, "Temperature of the relaxed masks (6), a float."
    )
    auxiliary_weight = TrainingSetting(
        check_weight, "Weight of the loss of the auxiliary classifier, a float."
    )

    predict_mode = PredictAttribute(
        lambda setting: setting.mode,
        'What inference computes: `"expected"`, `"sampled"`, `"exact"` or `"softmax"`.',
        "Call `tf_dropmax.set_predict_mode(model, mode)`.",
    )
    predict_samples = PredictAttribute(
        lambda setting: setting.samples,
        'Number of masks in mode `"sampled"`, a positive int.',
        "Call `tf_dropmax.set_predict_mode(model, mode, samples)`.",
    )
    predict_temperature = PredictAttribute(
        lambda setting: setting.temperature,
        "Temperature of the log-probabilities of the present mode, a float. See `calibrate`.",
        "Call `tf_dropmax.set_predict_temperature(model, temperature)`, or calibrate the model.",
    )

    predict_temperatures = PredictAttribute(
        lambda setting: dict(zip(PREDICT_MODES, setting.temperatures, strict=True)),
        "Temperatures of the log-probabilities of all modes, a dictionary. See `calibrate`.",
        "Call `tf_dropmax.set_predict_temperature(model, temperature)`, or calibrate the model.",
    )

    def __init__(
        self,
        units: int,
        *,
        retain_probability: float | None = None,
        stochastic: bool = True,
        temperature: float = 0.1,
        entropy_weight: float | None = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        retain_kernel_initializer: Any = "glorot_uniform",
        retain_bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        retain_kernel_regularizer: Any = None,
        retain_bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        retain_kernel_constraint: Any = None,
        retain_bias_constraint: Any = None,
        predict_mode: str = "expected",
        predict_samples: int = 30,
        seed: int | None = None,
        posterior: str = "prior",
        auxiliary_weight: float | None = None,
        predict_temperatures: dict[str, float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            check_positive_int("units", units),
            check_boolean("use_bias", use_bias),
            check_seed(seed),
            {
                "kernel": (kernel_initializer, kernel_regularizer, kernel_constraint),
                "bias": (bias_initializer, bias_regularizer, bias_constraint),
                "retain_kernel": (
                    retain_kernel_initializer,
                    retain_kernel_regularizer,
                    retain_kernel_constraint,
                ),
                "retain_bias": (
                    retain_bias_initializer,
                    retain_bias_regularizer,
                    retain_bias_constraint,
                ),
            },
            **kwargs,
        )
        if retain_probability is not None:
            retain_probability = check_probability("retain_probability", retain_probability)
        self.retain_probability = retain_probability
        self.stochastic = check_boolean("stochastic", stochastic)
        self.posterior = check_one_of("posterior", posterior, POSTERIORS)
        self.supports_masking = True
        self._objective = self._make_objective()
        self._branches += self._objective.branches
        self.temperature = temperature
        if entropy_weight is None:
            entropy_weight = default_entropy_weight(self.units)
        self.entropy_weight = entropy_weight
        if auxiliary_weight is None:
            auxiliary_weight = default_auxiliary_weight(self.units)
        self.auxiliary_weight = auxiliary_weight
        self._predict_setting = PredictSetting.of_arguments(
            predict_mode, predict_samples, predict_temperatures
        )
        self._switches = 0  # how often `modes` has changed the setting
        # The layers, usually models, whose graphs hold a prediction of this head; see `modes`.
        self._traced_in: weakref.WeakSet[keras.layers.Layer] = weakref.WeakSet()
        # `DropMaxMonitor` sets it to hear of the inputs of every prediction.
        self._listener: Callable[[Any, Any], None] | None = None
        # Two streams of masks, so that a prediction never changes the course of training.
        self._train_seeds, self._predict_seeds = (
            keras.random.SeedGenerator(derived_seed(self.seed, purpose))
            for purpose in ("training masks", "prediction masks")
        )
        # Keras tracks the generators. TensorFlow's checkpoints and SavedModels need the variables.
        self._train_seed_state = self._train_seeds.state.value
        self._predict_seed_state = self._predict_seeds.state.value

    @classmethod
    def from_dense(cls, dense: keras.layers.Dense, **kwargs: Any) -> Self:
        """A built head that starts from the kernel and bias of a trained `Dense` layer.

        Train `dense` first, because the head copies its weights. Compile the new model with
        `DropMaxLoss`.

        The head takes `units` and `use_bias` from `dense`. It also takes the dtype policy,
        initializers, regularizers and constraints, unless you pass others. An
        `activity_regularizer` and `trainable` are not copied. The retain branch starts at zero, so
        every retain probability is 1/2. In mode `"expected"` the head then predicts what the
        softmax of `dense` did.

        Args:
            dense: A built `keras.layers.Dense` with activation `"linear"` or `"softmax"`, not
                quantized. It stays unchanged, because the head copies its weights.
            **kwargs: Arguments of `DropMaxHead`, except `units` and `use_bias`.

        Returns:
            A built `DropMaxHead`.

        Raises:
            TypeError: If `dense` is not a `Dense` layer.
            ValueError: If `dense` is not built, is quantized or has another activation; or if
                `units` or `use_bias` is given.

        Example:

        >>> dense = keras.layers.Dense(3)
        >>> features = np.ones((2, 4), "float32")
        >>> logits = dense(features)
        >>> head = tf_dropmax.DropMaxHead.from_dense(dense)
        >>> bool(np.allclose(head(features), tf.nn.log_softmax(logits), atol=1e-6))
        True
        """
        arguments = _arguments_of_dense(dense)
        for name in ("units", "use_bias"):
            if name in kwargs:
                raise ValueError(
                    f"`{name}` must not be given, because the head has that of `dense`. "
                    f"Received: {name}={kwargs[name]!r}"
                )
        head = cls(**{"retain_kernel_initializer": "zeros", **arguments, **kwargs})
        kernel = tf.convert_to_tensor(dense.kernel)
        head.build((None, kernel.shape[0]))
        head.kernel.assign(kernel)
        if dense.use_bias:
            head.bias.assign(tf.convert_to_tensor(dense.bias))
        return head

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and "_objective" in vars(self):
            raise AttributeError(
                f"`{name}` cannot be set, because weights, masks and training depend on it. "
                f"Make a new head. Received: {name}={value!r}"
            )
        super().__setattr__(name, value)

    def _make_objective(self) -> Objective:
        return objective_of(self.retain_probability, self.stochastic, self.posterior)

    def call(
        self, inputs: Any, training: bool = False, mask: Any = None, *, output: str = "classes"
    ) -> tf.Tensor:
        """Scores in training, log-probabilities at inference.

        Args:
            inputs: Float tensor, shape `(batch, ..., d)`.
            training: Bool. Defaults to `False`.
            mask: `None` or bool tensor, shape `(batch, ...)`, the Keras mask. The entropy term
                ignores positions where it is `False`. Defaults to `None`.
            output: `"classes"`, `"retain_probabilities"` (4) or `"logits"`. The last two are the
                same in training and at inference. To make them an output of the model, call the
                same layer a second time. Such a call adds no entropy term. Keras applies an
                `activity_regularizer` to every call. Defaults to `"classes"`.

        Returns:
            Tensor of shape `(batch, ..., units)`, float32 (float64 under the policy `"float64"`).

        Raises:
            ValueError: If the inputs are not floating point or have another last dimension, or
                `output` is not as above.
        """
        self._check_dtype(inputs.dtype)
        if check_one_of("output", output, OUTPUTS) == "retain_probabilities":
            return self.retain_probabilities(inputs)
        logits = self._product(inputs, "classes")
        if output == "logits":
            return logits
        if training:
            return self._scores(logits, inputs, mask)
        around = traced_layer()
        if around is not None:
            # With a stale graph in a model around the head, a change of the mode would be lost.
            self._traced_in.add(around)
            vars(around).setdefault(_TRACED, weakref.WeakKeyDictionary())[self] = None
        if self._listener is not None:
            self._listener(inputs, mask)
        return log_probabilities(
            self._predict_setting,
            logits,
            partial(self._retain_logits, inputs, logits),
            partial(next_seed, self._predict_seeds),
        )

    def _retain_logits(self, features: Any, logits: tf.Tensor) -> tf.Tensor:
        if self.retain_probability is None:
            return self._product(features, "retain")
        constant = math.log(self.retain_probability) - math.log1p(-self.retain_probability)
        return tf.fill(tf.shape(logits), tf.constant(constant, logits.dtype))

    def _scores(self, logits: tf.Tensor, features: Any, mask: Any) -> tf.Tensor:
        def uniform():
            return functional.uniform_draws(
                tf.shape(logits), next_seed(self._train_seeds), logits.dtype
            )

        settings = {
            name: getattr(DropMaxHead, name).tensor(self, logits.dtype)
            for name in ("entropy_weight", "temperature", "auxiliary_weight")
        }
        step = TrainingStep(logits, partial(self._product, features), uniform, **settings)
        scores, entropy = self._objective.scores_and_entropy(step)
        if entropy is not None:
            self.add_loss(-step.entropy_weight * _masked_mean(entropy, mask))
        return scores

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

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.units)

    def compute_output_spec(
        self, inputs: Any, training: bool = False, mask: Any = None, *, output: str = "classes"
    ) -> keras.KerasTensor:
        self._check_dtype(inputs.dtype)
        check_one_of("output", output, OUTPUTS)
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype=self._output_dtype)

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        # The position in the stream of training masks, from which a resumed training goes on.
        store["steps"] = self._train_seeds.state.numpy()[1]

    def load_own_variables(self, store: Any) -> None:
        stored = {key: store[key] for key in store.keys()}  # noqa: SIM118 (it is no mapping)
        steps = stored.pop("steps", None)  # Other programs may have written the file.
        super().load_own_variables(stored)
        if steps is not None:
            seed = self._train_seeds.state.numpy()[0]
            self._train_seeds.state.assign([seed, int(np.asarray(steps))])

    def get_config(self) -> dict[str, Any]:
        names = (
            "retain_probability",
            "stochastic",
            "temperature",
            "entropy_weight",
            "predict_mode",
            "predict_samples",
            "posterior",
            "auxiliary_weight",
            "predict_temperatures",
        )
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def traced_heads(layer: keras.layers.Layer) -> list[DropMaxHead]:
    """The heads whose predictions the graphs of a layer hold, in the order of the first trace.

    Keras tracks no head that is called in a closure or kept in an object that is no layer.
    """
    return list(vars(layer).get(_TRACED, ()))


def _masked_mean(values: tf.Tensor, mask: Any) -> tf.Tensor:
    """Mean of `values` where `mask` is true, as Keras averages a masked loss, or 0."""
    weights = tf.ones_like(values) if mask is None else tf.cast(mask, values.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(values * weights), tf.reduce_sum(weights))


def _arguments_of_dense(dense: keras.layers.Dense) -> dict[str, Any]:
    """The arguments with which a head has the units, bias, dtype and penalties of `dense`."""
    if not isinstance(dense, keras.layers.Dense):
        raise TypeError(f"`dense` must be a `keras.layers.Dense`. Received: dense={dense!r}")
    if not dense.built:
        raise ValueError(f"`dense` must be built. Received: unbuilt layer {dense.name!r}")
    if dense.activation not in (keras.activations.linear, keras.activations.softmax):
        activation = keras.activations.serialize(dense.activation)
        raise ValueError(
            "`dense` must have activation 'linear' or 'softmax', because the head starts from its "
            f"logits. Received: activation={activation!r}"
        )
    if dense.quantization_mode is not None:
        mode = dense.quantization_mode
        raise ValueError(f"`dense` must not be quantized. Received: quantization_mode={mode!r}")
    penalties = {
        f"{weight}_{kind}": getattr(dense, f"{weight}_{kind}")
        for weight in ("kernel", "bias")
        for kind in KINDS
    }
    return {
        "units": dense.units,
        "use_bias": dense.use_bias,
        "dtype": dense.dtype_policy,
        **penalties,
    }
