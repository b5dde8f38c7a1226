"""Search spaces of keras-tuner for the head.

`import tf_dropmax` does not import this module: write `from tf_dropmax import tuning`.

The setting that matters most is `entropy_weight`. You can tune it without this module:

>>> def build(hp):
...     entropy_weight = hp.Float("entropy_weight", 1e-2, 10.0, sampling="log", default=1.0)
...     head = tf_dropmax.DropMaxHead(3, entropy_weight=entropy_weight)
...     model = keras.Sequential([keras.Input((4,)), head])
...     nll = tf_dropmax.NegativeLogLikelihood(name="nll")
...     model.compile("adam", tf_dropmax.DropMaxLoss(), metrics=["accuracy", nll])
...     return model
>>> objective = keras_tuner.Objective("val_nll", "min")
>>> tuner = keras_tuner.RandomSearch(build, objective, max_trials=20, directory=directory)

`dropmax_head` knows the other settings that are worth a search, with their ranges.
`DropMaxHyperModel` also builds and compiles the model.

Use a metric on validation data as the objective: `val_nll` as above, or `val_accuracy`. Do not use
the training loss: it depends on `entropy_weight`, so a tuner could lower it without a better model.
`val_loss` contains the penalties of the regularizers, so use it only if you do not tune
regularizers.

All tuners of keras-tuner accept these spaces. `BayesianOptimization` needs scikit-learn and scipy:
`pip install 'keras-tuner[bayesian]'`.

`RandomSearch`, `BayesianOptimization` and `Hyperband` can be resumed. To resume a search that was
killed, run the same program again with `overwrite=False`, the default. The interrupted trial is
repeated. The grid search of keras-tuner cannot be resumed
(https://github.com/keras-team/keras-tuner/issues/1055).

The `seed` of a tuner determines the values that it tries, unless it is 0, which keras-tuner
ignores. To have the same masks and initial weights of the head in all trials, give the head a
`seed`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import keras
import keras_tuner

from tf_dropmax.head import DropMaxHead
from tf_dropmax.head.variants import class_scale
from tf_dropmax.losses import DropMaxLoss
from tf_dropmax.metrics import NegativeLogLikelihood

TUNABLE = ("entropy_weight", "temperature", "posterior", "retain_l2")


def dropmax_head(
    hp: keras_tuner.HyperParameters,
    units: int,
    tune: Collection[str] = ("entropy_weight",),
    **kwargs: Any,
) -> DropMaxHead:
    """A `DropMaxHead` with settings from the search space. Use it in any `build(hp)`.

    These names can be tuned:

    - `"entropy_weight"`: log-uniform from a hundredth of the default to ten times the default,
      which is [0.01, 10] up to 30 classes. The paper tried 0.0001 to 1.
    - `"temperature"`: log-uniform in [0.05, 1]. Above 1 the density of a relaxed mask with retain
      probability 1/2 is highest in the middle. At low temperatures, most masks are so close to 0
      or 1 that they have almost no gradient.
    - `"posterior"`: `"prior"` or `"label"`. With `"label"` there is also an entry
      `"auxiliary_weight"`, log-uniform from a tenth of the default to ten times the default, which
      is [0.01, 1] up to 30 classes. The paper uses 1.
    - `"retain_l2"`: 0, 1e-4, 1e-3 or 1e-2, as the weight decays of the paper, for an L2
      regularizer of the retain kernel (and of the auxiliary kernel, if there is one).

    If you give the tuner an entry of the same name (`hyperparameters=`), the head uses that entry.
    The entry may be another range, a `Choice` or a `Fixed`. Two heads of a model share their
    entries, unless you make one of them inside `hp.name_scope`.

    Args:
        hp: A `keras_tuner.HyperParameters`.
        units: Positive int, the number of classes T.
        tune: Collection of the names above. Defaults to `("entropy_weight",)`.
        **kwargs: Arguments of `DropMaxHead`, except those that are tuned.

    Returns:
        A `DropMaxHead`.

    Raises:
        ValueError: If `tune` has another name; or as `DropMaxHead`.
        TypeError: If `kwargs` contain an argument that is tuned.

    Example:

    >>> space = keras_tuner.HyperParameters()
    >>> weight = space.Choice("entropy_weight", [0.1, 1.0, 10.0])  # a grid instead of the range
    >>> head = tuning.dropmax_head(space, 3, tune=["entropy_weight", "temperature"], seed=0)
    >>> space.values
    {'entropy_weight': 0.1, 'temperature': 0.1}
    """
    if unknown := set(tune) - set(TUNABLE):
        raise ValueError(
            f"`tune` must be names out of {TUNABLE}. Received: {sorted(unknown)} in tune={tune!r}"
        )

    def around(name: str, default: float, low: float, high: float) -> float:
        return hp.Float(name, low * default, high * default, sampling="log", default=default)

    settings: dict[str, Any] = {}
    if "entropy_weight" in tune:
        settings["entropy_weight"] = around("entropy_weight", class_scale(units), 0.01, 10)
    if "temperature" in tune:
        settings["temperature"] = around("temperature", 0.1, 0.5, 10)
    if "posterior" in tune:
        settings["posterior"] = hp.Choice("posterior", ["prior", "label"])
        with hp.conditional_scope("posterior", ["label"]):
            # keras-tuner gives `None` if the posterior is "prior". Then the head uses its default.
            weight = around("auxiliary_weight", 0.1 * class_scale(units), 0.1, 10)
            settings["auxiliary_weight"] = weight
    if "retain_l2" in tune:
        strength = hp.Choice("retain_l2", [0.0, 1e-4, 1e-3, 1e-2])
        if strength:
            regularizer = keras.regularizers.L2(strength)
            given = kwargs.pop("retain", None) or {}
            settings["retain"] = {**given, "kernel_regularizer": regularizer}
    return DropMaxHead(units, **settings, **kwargs)


class DropMaxHyperModel(keras_tuner.HyperModel):
    """A hypermodel: your features, a head with tuned settings on top, compiled.

    Labels are sparse or dense, as for `DropMaxLoss`. The metrics are `"accuracy"` and `"nll"`, the
    negative log-likelihood in nats. Give the attribute `objective` to the tuner. It is `nll` on
    validation data, which contains neither `entropy_weight` nor the penalties of regularizers.

    If `features` and `optimizer` are functions of a module, the hypermodel can be pickled.

    Args:
        features: Function of `hp` that returns a functional or sequential `keras.Model` with one
            output, the features. It may add entries to the search space. Every call must return a
            new model, unless the model has no trainable weights: otherwise a trial starts from the
            trained weights of another.
        units: Positive int, the number of classes T.
        optimizer: String, or function of `hp` that returns an optimizer. Defaults to `"adam"`.
        tune: As for `dropmax_head`. Defaults to `("entropy_weight",)`.
        **kwargs: Arguments of `DropMaxHead`, except those that are tuned.

    Example:

    >>> def features(hp):
    ...     hidden = keras.layers.Dense(hp.Int("width", 8, 32), "relu")
    ...     return keras.Sequential([keras.Input((4,)), hidden])
    >>> tune = ["entropy_weight", "temperature"]
    >>> hypermodel = tuning.DropMaxHyperModel(features, 3, tune=tune)
    >>> tuner = keras_tuner.RandomSearch(
    ...     hypermodel, hypermodel.objective, max_trials=2, directory=directory
    ... )
    >>> x, y = np.random.default_rng(0).normal(size=(64, 4)), np.arange(64) % 3
    >>> tuner.search(x[:48], y[:48], validation_data=(x[48:], y[48:]), verbose=0)
    >>> best = tuner.get_best_models()[0]
    >>> best.predict(x, verbose=0).shape
    (64, 3)
    """

    objective = keras_tuner.Objective("val_nll", "min")

    def __init__(
        self,
        features: Callable[[keras_tuner.HyperParameters], keras.Model],
        units: int,
        optimizer: str
        | Callable[[keras_tuner.HyperParameters], keras.optimizers.Optimizer] = "adam",
        tune: Collection[str] = ("entropy_weight",),
        **kwargs: Any,
    ):
        super().__init__()
        self.features = features
        self.units = units
        self.optimizer = optimizer
        self.tune = tuple(tune)
        self.kwargs = kwargs

    def build(self, hp: keras_tuner.HyperParameters) -> keras.Model:
        """The compiled model of a trial.

        Args:
            hp: A `keras_tuner.HyperParameters`.

        Returns:
            A `keras.Model`.

        Raises:
            ValueError, TypeError: As `dropmax_head`.

        Example:

        >>> def features(hp):
        ...     hidden = keras.layers.Dense(hp.Int("width", 8, 32), "relu")
        ...     return keras.Sequential([keras.Input((4,)), hidden])
        >>> space = keras_tuner.HyperParameters()
        >>> model = tuning.DropMaxHyperModel(features, 3).build(space)
        >>> model.output_shape
        (None, 3)
        >>> space.values
        {'width': 8, 'entropy_weight': 1.0}
        """
        features = self.features(hp)
        inputs = features.inputs[0] if isinstance(features, keras.Sequential) else features.input
        head = dropmax_head(hp, self.units, self.tune, **self.kwargs)
        model = keras.Model(inputs, head(features.outputs[0]))
        optimizer = self.optimizer if isinstance(self.optimizer, str) else self.optimizer(hp)
        metrics = ["accuracy", NegativeLogLikelihood(name="nll")]
        model.compile(optimizer, DropMaxLoss(), metrics=metrics)
        # Hyperband loads the weights of an earlier trial into this model. Keras would ignore the
        # variables of an optimizer that is not built.
        model.optimizer.build(model.trainable_variables)
        return model
