"""Tuning the head with keras-tuner. `import tf_dropmax` does not import this: `from tf_dropmax import tuning`.

The setting that matters is `entropy_weight`, and to tune it takes nothing from here:

>>> def build(hp):
...     entropy_weight = hp.Float("entropy_weight", 1e-2, 10.0, sampling="log", default=1.0)
...     model = keras.Sequential([keras.Input((4,)), tf_dropmax.DropMaxHead(3, entropy_weight=entropy_weight)])
...     nll = keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="nll")
...     model.compile("adam", tf_dropmax.DropMaxLoss(), metrics=["accuracy", nll])
...     return model
>>> objective = keras_tuner.Objective("val_nll", "min")
>>> tuner = keras_tuner.RandomSearch(build, objective, max_trials=20, directory=directory)

What is here knows the other settings that are worth a search, with their ranges (`dropmax_head`), and compiles the model too
(`DropMaxHyperModel`). And a grid search that was killed goes on (`GridSearch`).

The objective must measure the same for every trial: a metric on validation data, `val_nll` as above or `val_accuracy`. The
training loss has `entropy_weight` in it, and a tuner could lower it without anything learned. `val_loss` has not, but it has
the penalties of the model's regularizers: it will do only if none of these is tuned.

Every tuner of keras-tuner 1.4.8 takes these spaces. `GridSearch` tries eleven values of a range: the default and ten at even
distances on the logarithmic scale; to have fewer, give it entries of your own, see `dropmax_head`. `BayesianOptimization`
needs scikit-learn and scipy, `pip install 'keras-tuner[bayesian]'`. A search that was killed goes on where it was, with the
trial that was cut off, when the same program runs again with `overwrite=False`, the default. Only `keras_tuner.GridSearch`
does not: it fails with a `KeyError`, and `GridSearch` of this module takes its place. The `seed` of a tuner is for the values
it tries; masks and initial weights of the head are the same in all trials if the head has a `seed`.
"""

import functools
import json
import os
import weakref

import keras
import keras_tuner
import tensorflow as tf

from tf_dropmax.head import POSTERIORS, DropMaxHead
from tf_dropmax.losses import DropMaxLoss
from tf_dropmax.metrics import NegativeLogLikelihood

TUNABLE = ("entropy_weight", "temperature", "posterior", "retain_l2")


def dropmax_head(hp, units, tune=("entropy_weight",), **kwargs):
    """A `DropMaxHead` with settings from the search space, for any `build(hp)`. By name, these can be tuned:

    - `"entropy_weight"`: log-uniform, from a hundredth of what it is by default to ten times that: [0.01, 10] unless there are
      many classes. The paper tried 0.0001 to 1, and no more.
    - `"temperature"`: log-uniform in [0.05, 1]. Above 1 the density of a relaxed mask of retain probability 1/2 is highest in
      the middle, not at 0 and 1; the lower the temperature, the fewer masks are soft enough to pass on a gradient.
    - `"posterior"`: `"prior"` or `"label"`, and for `"label"` an entry `"auxiliary_weight"`, log-uniform, from a tenth of its
      default to ten times that, [0.01, 1] unless there are many classes. The paper has 1.
    - `"retain_l2"`: 0, 1e-4, 1e-3 or 1e-2, the paper's weight decays, for an L2 regularizer of the retain kernel.

    An entry of the same name that the tuner was given (`hyperparameters=`) takes the place of the one here: another range,
    a `Choice` or a `Fixed`. A second head of the model shares the entries of the first, unless it is made in a
    `hp.name_scope`.

    Args:
        hp: A `keras_tuner.HyperParameters`.
        units: Positive int, the number of classes T.
        tune: Collection of the names above. Defaults to `("entropy_weight",)`.
        **kwargs: Arguments of `DropMaxHead`, except those that are tuned.

    Returns:
        A `DropMaxHead`.

    Raises:
        ValueError: if `tune` has another name, or one that has no effect on the head that `kwargs` describe.
        TypeError: if `kwargs` have what is tuned.

    Example:

    >>> space = keras_tuner.HyperParameters()
    >>> entropy_weight = space.Choice("entropy_weight", [0.1, 1.0, 10.0])  # a grid in place of the range
    >>> head = tuning.dropmax_head(space, 3, tune=["entropy_weight", "temperature"], seed=0)
    >>> space.values
    {'entropy_weight': 0.1, 'temperature': 0.1}
    """
    tune = set(tune)
    if not tune <= set(TUNABLE):
        raise ValueError(f"`tune` must be a collection of names out of {TUNABLE}. Received: tune={sorted(tune, key=str)}")
    retain_probability, stochastic = kwargs.get("retain_probability"), kwargs.get("stochastic", True)
    needless = tune if retain_probability is not None else set() if stochastic else tune & {"temperature", "posterior"}
    if needless:
        raise ValueError(
            "`tune` must not name what has no effect: random DropMax learns no retain probabilities, deterministic attention "
            f"has no masks. Received: tune={sorted(needless)}, retain_probability={retain_probability}, stochastic={stochastic}"
        )
    defaults = DropMaxHead(units, name="defaults", seed=0).get_config()  # some depend on the number of classes
    settings = {}
    if "entropy_weight" in tune:
        weight = defaults["entropy_weight"]
        settings["entropy_weight"] = hp.Float("entropy_weight", weight / 100, weight * 10, sampling="log", default=weight)
    if "temperature" in tune:
        settings["temperature"] = hp.Float("temperature", 0.05, 1.0, sampling="log", default=0.1)
    if "posterior" in tune:
        settings["posterior"] = hp.Choice("posterior", list(POSTERIORS))
        with hp.conditional_scope("posterior", ["label"]):
            weight = defaults["auxiliary_weight"]
            auxiliary_weight = hp.Float("auxiliary_weight", weight / 10, weight * 10, sampling="log", default=weight)
        settings["auxiliary_weight"] = auxiliary_weight or 0.0  # `None` while the posterior is another
    if "retain_l2" in tune:
        strength = hp.Choice("retain_l2", [0.0, 1e-4, 1e-3, 1e-2])
        settings["retain_kernel_regularizer"] = keras.regularizers.L2(strength) if strength else None
    return DropMaxHead(units, **settings, **kwargs)


class DropMaxHyperModel(keras_tuner.HyperModel):
    """A hypermodel: the features are yours, on top comes a head with tuned settings, and the model is compiled.

    The metrics are the accuracy and `nll`, the negative log-likelihood in nats; labels are sparse or dense, as for
    `DropMaxLoss`. On validation data `nll` is the objective to give to a tuner, as `objective`; it has neither
    `entropy_weight` in it nor any regularizer.

    Args:
        features: Function of `hp` that returns a `keras.Model`, functional or sequential, which makes features of the inputs,
            its one output; it may have entries of its own in the space. Every call must make a new model, unless nothing in
            it is trainable.
        units: Positive int, the number of classes T.
        optimizer: String, or function of `hp` that returns an optimizer. Defaults to `"adam"`.
        tune: As for `dropmax_head`. Defaults to `("entropy_weight",)`.
        **kwargs: Arguments of `DropMaxHead`, except those that are tuned.

    Attributes:
        objective: The `keras_tuner.Objective` of the validation data's negative log-likelihood.

    Raises:
        ValueError: if `features` or `optimizer` is not as above; when a model is built, as `build`.

    Example:

    >>> def features(hp):
    ...     return keras.Sequential([keras.Input((4,)), keras.layers.Dense(hp.Int("width", 8, 32), "relu")])
    >>> hypermodel = tuning.DropMaxHyperModel(features, 3, tune=["entropy_weight", "temperature"])
    >>> tuner = keras_tuner.RandomSearch(hypermodel, hypermodel.objective, max_trials=2, directory=directory)
    >>> x, y = np.random.default_rng(0).normal(size=(64, 4)), np.arange(64) % 3
    >>> tuner.search(x[:48], y[:48], validation_data=(x[48:], y[48:]), verbose=0)
    >>> best = tuner.get_best_models()[0]
    >>> best.predict(x, verbose=0).shape
    (64, 3)
    """

    objective = keras_tuner.Objective("val_nll", "min")

    def __init__(self, features, units, optimizer="adam", tune=("entropy_weight",), **kwargs):
        super().__init__()
        if not callable(features) or isinstance(features, keras.Model):
            raise ValueError(f"`features` must be a function of `hp` that returns a Keras model. Received: {features!r}")
        if not isinstance(optimizer, str) and not callable(optimizer):
            raise ValueError(
                "`optimizer` must be a string or a function of `hp`: every trial needs an optimizer of its own. "
                f"Received: optimizer={optimizer!r}"
            )
        self.features = features
        self.units = units
        self.optimizer = optimizer
        self.tune = tune
        self.kwargs = kwargs
        self._used = weakref.WeakSet()  # models that `features` has returned

    def build(self, hp):
        """The compiled model: features, and the head on top.

        Args:
            hp: A `keras_tuner.HyperParameters`.

        Returns:
            A `keras.Model`.

        Raises:
            ValueError: if `features` returns no model that is functional or sequential and built, one that has not one output,
                or a trainable one that it returned before, whose weights an earlier trial would have trained; as
                `dropmax_head`.
            TypeError: as `dropmax_head`.

        Example:

        >>> def features(hp):
        ...     return keras.Sequential([keras.Input((4,)), keras.layers.Dense(hp.Int("width", 8, 32), "relu")])
        >>> space = keras_tuner.HyperParameters()
        >>> model = tuning.DropMaxHyperModel(features, 3).build(space)
        >>> model.output_shape
        (None, 3)
        >>> space.values
        {'width': 8, 'entropy_weight': 1.0}
        """
        features = self.features(hp)
        if not getattr(features, "inputs", None):
            raise ValueError(f"`features` must return a functional or sequential model that is built. Received: {features!r}")
        if len(features.outputs) != 1:
            raise ValueError(f"`features` must return a model with one output. Received: {len(features.outputs)} outputs")
        if features in self._used and features.trainable_variables:
            # Fatal: the tuner ends, and does not count it as a trial that failed.
            raise keras_tuner.errors.FatalValueError(
                "`features` must return a new model at every call, else trials go on from each other's trained weights. "
                f"Received: {features!r}, as before"
            )
        self._used.add(features)
        head = dropmax_head(hp, self.units, self.tune, **self.kwargs)
        inputs = features.inputs[0] if isinstance(features, keras.Sequential) else features.input
        model = keras.Model(inputs, head(features.outputs[0]))
        optimizer = self.optimizer if isinstance(self.optimizer, str) else self.optimizer(hp)
        model.compile(optimizer, DropMaxLoss(), metrics=["accuracy", NegativeLogLikelihood(name="nll")])
        # Else what a trial has saved of its optimizer would be left out, with a warning; Hyperband goes on from there.
        model.optimizer.build(model.trainable_variables)
        return model


def _save(stateful, path):
    """Written aside and renamed: whoever is killed leaves the old file or the new one, and none that is cut off."""
    with tf.io.gfile.GFile(f"{path}.new", "w") as file:
        file.write(json.dumps(stateful.get_state()))
    tf.io.gfile.rename(f"{path}.new", path, overwrite=True)


class _GridSearchOracle(keras_tuner.oracles.GridSearchOracle):
    """Takes from the files of the trials what its own file does not have, or not yet."""

    def save(self):
        _save(self, self._get_oracle_fname())

    def _save_trial(self, trial):
        _save(trial, os.path.join(self._get_trial_dir(trial.trial_id), "trial.json"))

    def reload(self):
        super().reload()
        self.start_order = sorted(self.trials, key=int)
        finished = [name for name in self.start_order if self.trials[name].status in ("COMPLETED", "FAILED")]
        for name in finished:
            self.update_space(self.trials[name].hyperparameters)
        self.end_order += [name for name in finished if name not in self.end_order]
        self._retry_queue = [name for name in self.start_order if name not in finished]
        for name in self._retry_queue:  # else the tuner would keep what was measured before the kill
            self.trials[name].metrics = type(self.trials[name].metrics)()
        values = {name: trial.hyperparameters.values for name, trial in self.trials.items()}
        self._ordered_ids = type(self._ordered_ids)()
        for name in sorted(values, key=functools.cmp_to_key(lambda a, b: self._compare(values[a], values[b]))):
            self._ordered_ids.insert(name)
        self._populate_next = finished  # which leaves out again what has been tried


class GridSearch(keras_tuner.GridSearch):
    """`keras_tuner.GridSearch`, which goes on where it was after a kill at any moment.

    In keras-tuner 1.4.8 a grid search that is resumed fails with a `KeyError`: it does not save in what order its trials lie on
    the grid (https://github.com/keras-team/keras-tuner/issues/1055). Nor does any of its tuners write its files in such a way
    that a kill in the midst of it does no harm. Here the order is found again from the files of the trials, and these files
    are whole at all times. No combination is lost; only the trial that was running is run again, from its start. When
    keras-tuner does that, this class can go.

    Args:
        hypermodel: A `keras_tuner.HyperModel`, or function of `hp` that returns a compiled model.
        objective: As for every tuner, for instance `DropMaxHyperModel.objective`.
        max_trials: Positive int, or `None` for all of the grid. Defaults to `None`.
        seed, hyperparameters, tune_new_entries, allow_new_entries, max_retries_per_trial, max_consecutive_failed_trials: As
            for `keras_tuner.GridSearch`, with the same defaults.
        **kwargs: As for every tuner: `directory`, `project_name`, `overwrite` and others.

    Raises:
        ValueError: as `keras_tuner.GridSearch`.

    Example:

    >>> def build(hp):
    ...     entropy_weight = hp.Choice("entropy_weight", [0.1, 1.0])
    ...     model = keras.Sequential([keras.Input((4,)), tf_dropmax.DropMaxHead(3, entropy_weight=entropy_weight)])
    ...     model.compile("adam", tf_dropmax.DropMaxLoss(), metrics=[tf_dropmax.NegativeLogLikelihood(name="nll")])
    ...     return model
    >>> objective = keras_tuner.Objective("val_nll", "min")
    >>> tuner = tuning.GridSearch(build, objective, directory=directory, project_name="grid")
    >>> x, y = np.random.default_rng(0).normal(size=(64, 4)), np.arange(64) % 3
    >>> tuner.search(x[:48], y[:48], validation_data=(x[48:], y[48:]), verbose=0)
    >>> sorted(trial.hyperparameters.get("entropy_weight") for trial in tuner.oracle.trials.values())
    [0.1, 1.0]
    """

    def __init__(
        self,
        hypermodel=None,
        objective=None,
        max_trials=None,
        seed=None,
        hyperparameters=None,
        tune_new_entries=True,
        allow_new_entries=True,
        max_retries_per_trial=0,
        max_consecutive_failed_trials=3,
        **kwargs,
    ):
        self.seed = seed
        oracle = _GridSearchOracle(
            objective=objective,
            max_trials=max_trials,
            seed=seed,
            hyperparameters=hyperparameters,
            tune_new_entries=tune_new_entries,
            allow_new_entries=allow_new_entries,
            max_retries_per_trial=max_retries_per_trial,
            max_consecutive_failed_trials=max_consecutive_failed_trials,
        )
        keras_tuner.Tuner.__init__(self, oracle, hypermodel, **kwargs)
        self.save()  # else a first trial that ended just before the kill would not be found

    def save(self):
        if not self._is_worker():
            self.oracle.save()
        _save(self, self._get_tuner_fname())
