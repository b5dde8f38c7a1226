"""DropMaxHead: the layer that replaces the logits layer of a classifier."""

import inspect
import math

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

from tf_dropmax import functional
from tf_dropmax.checks import check_boolean, check_number, check_one_of, check_positive_int, check_seed, check_weight
from tf_dropmax.seeds import next_seed

PREDICT_MODES = ("expected", "sampled", "exact", "softmax")
POSTERIORS = ("prior", "label")
OUTPUTS = ("classes", "retain_probabilities")

_FULL_WEIGHT_CLASSES = 30  # with more, the default weights of what is summed over classes fall in proportion

_EXPORT = inspect.unwrap(keras.Model.export).__code__
_KINDS = ("initializer", "regularizer", "constraint")


@keras.saving.register_keras_serializable("tf_dropmax")
class DropMaxHead(keras.layers.Layer):
    """Classifier head with adaptive stochastic softmax (DropMax).

    Put it where the logits layer `Dense(units)` was, and compile with `DropMaxLoss`:

        logits         o = features @ kernel + bias
        retain logits  r = features @ retain_kernel + retain_bias,  retain probability rho = sigmoid(r)        (4)

    In training every class but the target is kept in the softmax with probability `rho`, by relaxed Bernoulli masks (6). The
    layer sees no labels: it returns, for every class, the score that the class has if it is the target, and `DropMaxLoss`
    picks the target's. Together with the entropy term, `-entropy_weight * mean(sum_t H(rho_t))`, which the layer adds by
    `add_loss`, that is the objective (15) exactly. At inference it returns log-probabilities, `exp` of which sums to 1.
    Either way the output is in log space and float32 under every dtype policy but `float64` (which needs
    `keras.config.set_floatx("float64")` to train). Argmax and top-k metrics take it as it is, and `keras.layers.Softmax()`
    on top of a trained model serves probabilities. Train with `DropMaxLoss`: another loss would not minimise (15).

    `sample_weight`, `class_weight` and `loss_weights` multiply the loss, but, as with every `add_loss` in Keras, not the
    entropy term; nor does `reduction="sum"` of the loss turn that mean into a sum. Call the head on sequences and images as
    they are: `TimeDistributed` would add the entropy term once for every step.

    Args:
        units: Positive int, the number of classes T.
        retain_probability: `None` or float in (0, 1). `None`: adaptive DropMax, the retain probability is learned as a
            function of the features. A float: random DropMax, every non-target is kept with this probability by hard
            Bernoulli masks; there is no retain branch, no KL divergence and no entropy term. Defaults to `None`.
        stochastic: Bool. `False`: deterministic attention, which replaces every mask, in training too, by its retain
            probability; it trains on eq. (18) with the entropy term, and there is no KL divergence. Defaults to `True`.
        temperature: Positive float, temperature of the relaxed masks (6); small values are closer to hard masks. Defaults
            to 0.1, as in the paper.
        entropy_weight: Non-negative float, the paper's lambda, weight of the entropy regulariser (14); or `None`:
            `min(1, 30 / units)`. Larger values push retain probabilities towards 1/2. The regulariser is a sum over all classes
            and acts on the features too: with many classes the paper's largest weight, 1, can keep a network from learning
            anything. Defaults to `None`.
        use_bias: Bool, whether both branches have a bias. Defaults to `True`.
        kernel_initializer, retain_kernel_initializer: Initializers of the two kernels. Default to `"glorot_uniform"`.
        bias_initializer, retain_bias_initializer: Initializers of the two biases. Default to `"zeros"`.
        kernel_regularizer, bias_regularizer, retain_kernel_regularizer, retain_bias_regularizer: Regularizers. Default to
            `None`.
        kernel_constraint, bias_constraint, retain_kernel_constraint, retain_bias_constraint: Constraints. Default to `None`.
        predict_mode: `"expected"` (18), `"sampled"` (17), `"exact"` (16) or `"softmax"` (2): what inference computes. Can be
            changed later by `DropMaxPredict`, `tf_dropmax.predict_mode` or by setting the attribute; a compiled model follows
            without retracing. Defaults to `"expected"`.
        predict_samples: Positive int, number of masks S in mode `"sampled"`. Defaults to 30.
        seed: `None` or int. Seeds the masks, in training and in mode `"sampled"`, and those initializers of this layer that
            have no seed of their own. The global seeds are not touched. Defaults to `None`: a new seed for each layer.
        posterior: `"prior"` or `"label"`: where the training masks come from. `"prior"`: from the retain probabilities
            themselves (9), as in the submission. `"label"`: from a posterior that an auxiliary classifier on the same features
            informs about the label (NeurIPS 2018), see `tf_dropmax.functional.posterior_scores`; it adds the weights
            `auxiliary_kernel` and `auxiliary_bias`, which have the regularizers and constraints of the retain branch, and are
            not used by prediction. The kernel starts as Glorot's times `min(1, 30 / units)`, for how far the posterior is from
            the prior is a sum over classes too. Defaults to `"prior"`.
        auxiliary_weight: Non-negative float, weight of the auxiliary classifier's loss with `posterior="label"`, also a sum
            over all classes; 1.0 is as published. `None`: `min(0.1, 3 / units)`. Defaults to `None`.
        **kwargs: `name`, `dtype`, `trainable`, `activity_regularizer`, as for every Keras layer.

    Input shape:
        `(batch, ..., d)`, floating point, two or more dimensions, the last of them known.

    Output shape:
        `(batch, ..., units)`.

    Raises:
        ValueError, TypeError: if an argument is not as above, the input is of an integer type or its last dimension unknown.

    Example:

    >>> model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(32, "relu"), tf_dropmax.DropMaxHead(10)])
    >>> model.compile("adam", tf_dropmax.DropMaxLoss(), metrics=["accuracy"])
    >>> x, y = np.random.default_rng(0).normal(size=(64, 20)), np.arange(64) % 10
    >>> history = model.fit(x, y, verbose=0)
    >>> probabilities = np.exp(model.predict(x, verbose=0))
    >>> probabilities.shape
    (64, 10)

    References:
        Lee et al., DropMax: Adaptive Stochastic Softmax, ICLR 2018 submission (the equation numbers); DropMax: Adaptive
        Variational Softmax, NeurIPS 2018, arXiv:1712.07834.
    """

    def __init__(
        self,
        units,
        retain_probability=None,
        stochastic=True,
        temperature=0.1,
        entropy_weight=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        retain_kernel_initializer="glorot_uniform",
        retain_bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        retain_kernel_regularizer=None,
        retain_bias_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        retain_kernel_constraint=None,
        retain_bias_constraint=None,
        predict_mode="expected",
        predict_samples=30,
        seed=None,
        posterior="prior",
        auxiliary_weight=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.units = check_positive_int("units", units)
        self.posterior = check_one_of("posterior", posterior, POSTERIORS)
        if retain_probability is not None:
            retain_probability = check_number(
                "retain_probability", retain_probability, "a float in (0, 1)", lambda x: 0 < x < 1
            )
            if not stochastic:
                raise ValueError(
                    "`stochastic=False` replaces the masks by learned retain probabilities and needs "
                    f"`retain_probability=None`. Received: retain_probability={retain_probability}"
                )
            if posterior != "prior":
                raise ValueError(
                    f"`posterior='label'` needs learned masks, `retain_probability=None`. "
                    f"Received: posterior={posterior!r}, retain_probability={retain_probability}"
                )
        if posterior == "label" and not stochastic:
            raise ValueError(
                "`posterior='label'` needs masks, `stochastic=True`. Received: posterior='label', stochastic=False"
            )
        scale = _class_scale(self.units)
        self.auxiliary_weight = 0.1 * scale if auxiliary_weight is None else check_weight("auxiliary_weight", auxiliary_weight)
        self.retain_probability = retain_probability
        self.stochastic = check_boolean("stochastic", stochastic)
        self.use_bias = check_boolean("use_bias", use_bias)
        self.seed = check_seed(seed)
        self.kernel_initializer = _initializer(kernel_initializer, self.seed, 0)
        self.bias_initializer = _initializer(bias_initializer, self.seed, 1)
        self.retain_kernel_initializer = _initializer(retain_kernel_initializer, self.seed, 2)
        self.retain_bias_initializer = _initializer(retain_bias_initializer, self.seed, 3)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.retain_kernel_regularizer = keras.regularizers.get(retain_kernel_regularizer)
        self.retain_bias_regularizer = keras.regularizers.get(retain_bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.retain_kernel_constraint = keras.constraints.get(retain_kernel_constraint)
        self.retain_bias_constraint = keras.constraints.get(retain_bias_constraint)
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self.supports_masking = True

        # Two streams of masks, so that a prediction never changes the course of training.
        self._train_seeds = keras.random.SeedGenerator(None if seed is None else self.seed % 2**62)
        self._predict_seeds = keras.random.SeedGenerator(None if seed is None else (self.seed + 1) % 2**62)
        # What may be set at any time is read in the graph, so that a compiled function sees it change. Not weights: a file of
        # weights does not depend on them, and `weights` are what `Dense` would have.
        train = _train_setting(scale if entropy_weight is None else entropy_weight, temperature)
        predict = _predict_setting(predict_mode, predict_samples)
        with tf.init_scope():
            # 64 bits: TensorFlow keeps 32-bit integer variables in host memory, where XLA on a GPU cannot read them; and a
            # float is then exactly what was set.
            self._train_state = tf.Variable(train, dtype=tf.float64, trainable=False, name="train_state")
            self._predict_state = tf.Variable(predict, dtype=tf.int64, trainable=False, name="predict_state")

    @property
    def entropy_weight(self):
        """Weight of the entropy regulariser (14), the paper's lambda, a float. Can be set."""
        return _read(self._train_state)[0]

    @entropy_weight.setter
    def entropy_weight(self, entropy_weight):
        self._train_state.assign(_train_setting(entropy_weight, self.temperature))

    @property
    def temperature(self):
        """Temperature of the relaxed masks (6), a float. Can be set."""
        return _read(self._train_state)[1]

    @temperature.setter
    def temperature(self, temperature):
        self._train_state.assign(_train_setting(self.entropy_weight, temperature))

    @property
    def predict_mode(self):
        """What inference computes: `"expected"`, `"sampled"`, `"exact"` or `"softmax"`. Can be set."""
        return self._get_predict_setting()[0]

    @predict_mode.setter
    def predict_mode(self, mode):
        self._set_predict_setting(mode, self.predict_samples)

    @property
    def predict_samples(self):
        """Number of masks in mode `"sampled"`, a positive int. Can be set."""
        return self._get_predict_setting()[1]

    @predict_samples.setter
    def predict_samples(self, samples):
        self._set_predict_setting(self.predict_mode, samples)

    def _get_predict_setting(self):
        index, samples = _read(self._predict_state)
        return PREDICT_MODES[index], samples

    def _set_predict_setting(self, mode, samples):
        self._predict_state.assign(_predict_setting(mode, samples))

    @classmethod
    def from_dense(cls, dense, **kwargs):
        """A built head that starts from the kernel and bias of a trained `Dense` layer.

        Units, bias, dtype policy, regularizers and constraints are the layer's unless given. The retain branch starts at
        zero: every retain probability is 1/2, so that the head at first predicts, in mode `"expected"`, just what the
        softmax of `dense` did. (The auxiliary branch of `posterior="label"`, which does not predict, starts as always.)

        Args:
            dense: A built `keras.layers.Dense` with activation `"linear"` or `"softmax"`, not quantized.
            **kwargs: Arguments of `DropMaxHead`, except `units` and `use_bias`.

        Returns:
            A built `DropMaxHead`. The weights are copies; `dense` stays as it is.

        Raises:
            TypeError: if `dense` is not a `Dense` layer.
            ValueError: if `dense` is not built, is quantized or has another activation.

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
        if not dense.built:
            raise ValueError(f"`dense` must be built, so that it has weights to start from. Received: unbuilt {dense.name!r}")
        if dense.activation not in (keras.activations.linear, keras.activations.softmax):
            raise ValueError(
                "`dense` must have activation 'linear' or 'softmax': its logits are what DropMax starts from. "
                f"Received: activation={keras.activations.serialize(dense.activation)!r}"
            )
        if dense.quantization_mode is not None:
            raise ValueError(f"`dense` must not be quantized. Received: quantization_mode={dense.quantization_mode!r}")
        for name in ("units", "use_bias"):
            if name in kwargs:
                raise ValueError(f"`{name}` is that of `dense` and cannot be given. Received: {name}={kwargs[name]!r}")
        inherited = {f"{name}_{kind}": getattr(dense, f"{name}_{kind}") for name in ("kernel", "bias") for kind in _KINDS}
        defaults = {"dtype": dense.dtype_policy, "retain_kernel_initializer": "zeros", **inherited}
        head = cls(dense.units, use_bias=dense.use_bias, **{**defaults, **kwargs})
        kernel = tf.convert_to_tensor(dense.kernel)
        head.build((None, kernel.shape[0]))
        head.kernel.assign(kernel)
        if dense.use_bias:
            head.bias.assign(tf.convert_to_tensor(dense.bias))
        return head

    def build(self, input_shape):
        features = input_shape[-1]
        if features is None:
            raise ValueError(
                f"The last dimension of the inputs of a DropMaxHead must be known. Received: input_shape={tuple(input_shape)}"
            )
        self.kernel, self.bias = self._add_branch(features)
        if self.retain_probability is None:
            self.retain_kernel, self.retain_bias = self._add_branch(features, "retain_")
        if self.posterior == "label":
            self.auxiliary_kernel, self.auxiliary_bias = self._add_branch(features, "auxiliary_")
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})

    def _add_branch(self, features, prefix=""):
        """Kernel and bias of one of the branches; the bias is `None` without `use_bias`."""
        like = prefix and "retain_"  # the auxiliary branch has what the retain branch has, but for its start

        def weight(name, shape):
            initializer, regularizer, constraint = (getattr(self, f"{like}{name}_{kind}") for kind in _KINDS)
            if prefix == "auxiliary_":
                initializer = "zeros" if name == "bias" else self._auxiliary_start()
            return self.add_weight(
                name=prefix + name, shape=shape, initializer=initializer, regularizer=regularizer, constraint=constraint
            )

        kernel = weight("kernel", (features, self.units))
        return kernel, weight("bias", (self.units,)) if self.use_bias else None

    def _auxiliary_start(self):
        # Glorot's, but closer to zero, where the posterior is the prior, if classes are many: with a thousand of them the
        # divergence between the two would come before all else, and the features vanish before they have learned anything.
        seed = None if self.seed is None else (self.seed + 4) % 2**31
        return keras.initializers.VarianceScaling(_class_scale(self.units) ** 2, "fan_avg", "uniform", seed=seed)

    def call(self, inputs, training=False, mask=None, *, output="classes"):
        """Scores (in training) or log-probabilities; or retain probabilities.

        Args:
            inputs: Float tensor, shape `(batch, ..., d)`.
            training: Bool. Defaults to `False`.
            mask: `None` or bool tensor, shape `(batch, ...)`, the Keras mask; positions where it is `False` do not count in
                the entropy term. Defaults to `None`.
            output: `"classes"` or `"retain_probabilities"`. The second is for a second call of the same layer, which makes
                the retain probabilities (4) an output of the model; see `tf_dropmax.TargetRetainProbability`. Such a call
                adds no entropy term (but Keras applies an `activity_regularizer` to every call). Defaults to `"classes"`.

        Returns:
            Tensor of shape `(batch, ..., units)`, float32 (float64 under the policy `"float64"`).

        Raises:
            ValueError: if the inputs are not floating point or have another last dimension, or `output` is not as above.
        """
        _check_floating(inputs.dtype)
        if check_one_of("output", output, OUTPUTS) == "retain_probabilities":
            return self.retain_probabilities(inputs)
        logits = self._branch(inputs, self.kernel, self.bias)
        if training:
            return self._scores(logits, inputs, mask)
        return self._log_probabilities(logits, self._retain_logits(inputs, logits))

    def _branch(self, features, kernel, bias):
        """One matrix product in the compute dtype; everything after it is in the output's dtype."""
        features, kernel = (keras.ops.cast(x, self.compute_dtype) for x in (features, kernel))
        product = tf.cast(keras.ops.matmul(features, kernel), self._output_dtype)
        return product if bias is None else product + tf.cast(bias, self._output_dtype)

    def _retain_logits(self, features, logits):
        if self.retain_probability is None:
            return self._branch(features, self.retain_kernel, self.retain_bias)
        constant = math.log(self.retain_probability) - math.log1p(-self.retain_probability)
        return tf.fill(tf.shape(logits), tf.constant(constant, logits.dtype))

    def _scores(self, logits, features, mask):
        if self.stochastic:
            uniform = functional.uniform(tf.shape(logits), next_seed(self._train_seeds), logits.dtype)
        if self.retain_probability is not None:
            masks = functional.bernoulli_mask_logits(self.retain_probability, uniform)
            return functional.target_log_likelihood(logits, masks)
        retain_logits = self._retain_logits(features, logits)
        entropy_weight, temperature = tf.unstack(tf.cast(self._train_state, logits.dtype))
        if self.stochastic and self.posterior == "prior":
            masks = functional.mask_logits(retain_logits, uniform, temperature)
            scores, entropy = functional.scores_and_entropy(logits, retain_logits, masks, entropy_weight)
            self._add_entropy_term(entropy, entropy_weight, mask)
            return scores
        entropy = functional.entropy(retain_logits)
        self._add_entropy_term(tf.reduce_sum(entropy, axis=-1), entropy_weight, mask)
        if not self.stochastic:
            return functional.expected(logits, retain_logits) - entropy_weight * entropy
        auxiliary_logits = self._branch(features, self.auxiliary_kernel, self.auxiliary_bias)
        posterior_logits = functional.posterior_logits(retain_logits, auxiliary_logits)
        masks = functional.mask_logits(posterior_logits, uniform, temperature)
        return functional.posterior_scores(logits, retain_logits, auxiliary_logits, masks, self.auxiliary_weight)

    def _add_entropy_term(self, entropy, entropy_weight, mask):
        self.add_loss(-entropy_weight * _masked_mean(entropy, mask))

    def _log_probabilities(self, logits, retain_logits):
        state = tf.identity(self._predict_state)  # `switch_case` wants a tensor
        modes = {
            "expected": lambda: functional.expected(logits, retain_logits),
            "sampled": lambda: functional.sampled(logits, retain_logits, state[1], next_seed(self._predict_seeds)),
            "exact": lambda: functional.exact(logits, retain_logits),
            "softmax": lambda: functional.softmax(logits),
        }
        target = _export_format()
        if target in ("onnx", "litert") and self.predict_mode == "sampled":
            raise ValueError(f"A file of format '{target}' cannot draw masks. Received: predict_mode='sampled'")
        if target is not None:  # the mode will not change any more, and other runtimes understand no switch
            return modes[self.predict_mode]()
        index = tf.cast(state[0], tf.int32)
        return tf.ensure_shape(tf.switch_case(index, [modes[name] for name in PREDICT_MODES]), logits.shape)

    def retain_probabilities(self, features):
        """Retain probability of every class, eq. (4).

        Args:
            features: Float tensor or array, shape `(batch, ..., d)`, what the head gets as its input.

        Returns:
            Tensor of shape `(batch, ..., units)`, float32 (float64 under the policy `"float64"`), values in [0, 1].

        Raises:
            ValueError: if the features are not floating point or have another last dimension.

        Example:

        >>> head = tf_dropmax.DropMaxHead(3, retain_kernel_initializer="zeros")
        >>> head.retain_probabilities(np.ones((1, 4), "float32")).numpy().tolist()
        [[0.5, 0.5, 0.5]]
        """
        if self.retain_probability is not None:
            features = tf.convert_to_tensor(features)
            _check_floating(features.dtype)
            shape = tf.concat([tf.shape(features)[:-1], [self.units]], axis=0)
            return tf.fill(shape, tf.constant(self.retain_probability, self._output_dtype))
        return tf.sigmoid(self._branch_of(features, "retain_"))

    def uncertainty(self, features, samples=100):
        """How uncertain a prediction is, and how much of that the masks account for.

        Args:
            features: Float tensor or array, shape `(batch, ..., d)`, what the head gets as its input.
            samples: Positive int, number of masks that are drawn. Defaults to 100.

        Returns:
            A `tf_dropmax.functional.Uncertainty`, see there. The predict mode makes no difference to it.

        Raises:
            ValueError: if the features are not floating point or have another last dimension, or `samples` is not as above.

        Example:

        >>> head = tf_dropmax.DropMaxHead(3, seed=1)
        >>> entropy, mutual_information, spread = head.uncertainty(np.ones((2, 4), "float32"))
        >>> mutual_information.shape, spread.shape
        (TensorShape([2]), TensorShape([2, 3]))
        """
        samples = check_positive_int("samples", samples)
        logits = self._branch_of(features)
        return functional.uncertainty(logits, self._retain_logits(features, logits), samples, next_seed(self._predict_seeds))

    def mask_distribution(self, features):
        """The distribution of the relaxed masks, eq. (6), for `log_prob`, `sample` and the rest.

        The head itself draws from the same distribution by `tf_dropmax.functional.relaxed_masks`, because the gradient of
        `RelaxedBernoulli.sample` is NaN where a mask comes close to 0 or 1.

        Args:
            features: Float tensor or array, shape `(batch, ..., d)`, what the head gets as its input.

        Returns:
            A `tfp.distributions.RelaxedBernoulli` with batch shape `(batch, ..., units)`.

        Raises:
            ValueError: if the head has no relaxed masks (`retain_probability` is given or `stochastic=False`).

        Example:

        >>> head = tf_dropmax.DropMaxHead(3)
        >>> head.mask_distribution(np.ones((2, 4), "float32")).sample(seed=1).shape
        TensorShape([2, 3])
        """
        if self.retain_probability is not None or not self.stochastic:
            raise ValueError(
                "Only adaptive DropMax has relaxed masks. Received: "
                f"retain_probability={self.retain_probability}, stochastic={self.stochastic}"
            )
        logits = self._branch_of(features, "retain_")
        if self.posterior == "label":
            logits = functional.posterior_logits(logits, self._branch_of(features, "auxiliary_"))
        return tfp.distributions.RelaxedBernoulli(self.temperature, logits=logits)

    def _branch_of(self, features, prefix=""):
        """Logits of a branch, for features that come from outside `call`."""
        features = tf.convert_to_tensor(features)
        _check_floating(features.dtype)
        if not self.built:
            self.build(features.shape)
        expected = self.kernel.shape[0]
        if features.shape[-1] != expected:
            raise ValueError(f"The features must have last dimension {expected}. Received: features.shape={features.shape}")
        return self._branch(features, getattr(self, f"{prefix}kernel"), getattr(self, f"{prefix}bias"))

    @property
    def _output_dtype(self):
        return "float64" if self.compute_dtype == "float64" else "float32"

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def compute_output_spec(self, inputs, training=False, mask=None, *, output="classes"):
        _check_floating(inputs.dtype)
        check_one_of("output", output, OUTPUTS)
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype=self._output_dtype)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        # How far the stream of training masks has come, so that a resumed training goes on where it stopped.
        store["steps"] = self._train_seeds.state.numpy()[1]

    def load_own_variables(self, store):
        stored = {key: store[key] for key in store.keys()}  # noqa: SIM118 (a store has keys, but is no mapping)
        steps = stored.pop("steps", None)  # absent from files written by other means
        super().load_own_variables(stored)
        if steps is not None:
            seed = self._train_seeds.state.numpy()[0]
            self._train_seeds.state.assign([seed, int(np.asarray(steps))])

    def get_config(self):
        config = {
            "units": self.units,
            "retain_probability": self.retain_probability,
            "stochastic": self.stochastic,
            "temperature": self.temperature,
            "entropy_weight": self.entropy_weight,
            "use_bias": self.use_bias,
            "predict_mode": self.predict_mode,
            "predict_samples": self.predict_samples,
            "seed": self.seed,
            "posterior": self.posterior,
            "auxiliary_weight": self.auxiliary_weight,
        }
        for name in ("kernel", "bias", "retain_kernel", "retain_bias"):
            for kind in _KINDS:
                serialize = getattr(keras, f"{kind}s").serialize
                config[f"{name}_{kind}"] = serialize(getattr(self, f"{name}_{kind}"))
        return {**super().get_config(), **config}


def _class_scale(units):
    """By what the default weights of sums over classes are multiplied."""
    return min(1.0, _FULL_WEIGHT_CLASSES / units)


def _read(variable):
    with tf.init_scope():
        return variable.numpy().tolist()


def _train_setting(entropy_weight, temperature):
    """What the variable of training holds."""
    entropy_weight = check_weight("entropy_weight", entropy_weight)
    return [entropy_weight, check_number("temperature", temperature, "a finite float > 0", lambda x: 0 < x < math.inf)]


def _predict_setting(mode, samples):
    """What the variable of prediction holds."""
    mode = check_one_of("predict_mode", mode, PREDICT_MODES)
    return [PREDICT_MODES.index(mode), check_positive_int("predict_samples", samples)]


def _export_format():
    """The format that `keras.Model.export` is tracing the head for, else `None`: Keras has no other sign of it."""
    graph = tf.compat.v1.get_default_graph()
    # A function within the model may have been traced before, and will be used afterwards.
    if tf.executing_eagerly() or isinstance(graph.outer_graph, tf.__internal__.FuncGraph):
        return None
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _EXPORT:
        frame = frame.f_back
    return frame and frame.f_locals["format"]


def _check_floating(dtype):
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(dtype)):
        raise ValueError(f"The inputs of a DropMaxHead must be floating point. Received: dtype={dtype}")


def _masked_mean(values, mask):
    """Mean of `values` where `mask` is true, as Keras averages a masked loss; 0 if that is nowhere or the batch empty."""
    weights = tf.ones_like(values) if mask is None else tf.cast(mask, values.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(values * weights), tf.reduce_sum(weights))


def _initializer(identifier, seed, offset):
    """The initializer, with a seed of its own if it is random, has none, and the head has one."""
    named = getattr(keras.initializers, identifier, None) if isinstance(identifier, str) and seed is not None else None
    if inspect.isclass(named) and "seed" in inspect.signature(named).parameters:
        return named(seed=(seed + offset) % 2**31)  # made without a seed first, it would draw one from Python's own stream
    initializer = keras.initializers.get(identifier)
    if seed is None or not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    config = initializer.get_config()
    if config.get("seed", 0) is not None:
        return initializer
    return type(initializer).from_config({**config, "seed": (seed + offset) % 2**31})
