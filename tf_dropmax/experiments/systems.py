"""The systems that are compared.

For each there is a head with its loss, the ways to predict with it, and the settings to search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax import (
    DropMaxHead,
    DropMaxLoss,
    SampledSoftmaxLoss,
    SparsemaxLoss,
    predict_mode,
    sparsemax,
)
from tf_dropmax.experiments import peers
from tf_dropmax.experiments.ablation import AblatedHead
from tf_dropmax.experiments.networks import decay
from tf_dropmax.objectives import class_scale


class System(NamedTuple):
    """A head with its loss.

    Attributes:
        build: Function `build(classes, seed, l2, **settings)` that returns a head and a loss.
        rows: Functions `predict(model, x)` that return log-probabilities, an array `(N, T)`, by
            the name of the way to predict. A search goes by the measures of the first.
        options: List of the system's own settings, for up to 30 classes. The first are its
            defaults. A search also chooses among `DECAYS` and `FEATURE_DECAYS`, which are the
            same for every system.
        logits: Function `logits(model, x)` that returns the logits, an array `(N, T)`.
    """

    build: Callable[..., tuple[keras.layers.Layer, Callable]]
    rows: Mapping[str, Callable[[keras.Model, np.ndarray], np.ndarray]]
    options: list[dict[str, Any]]
    logits: Callable[[keras.Model, np.ndarray], np.ndarray]

    def options_for(self, classes: int) -> list[dict[str, Any]]:
        """The options for a number of classes.

        Weights of terms that are sums over classes are scaled like the defaults of `DropMaxHead`.
        """
        return [
            {name: _scaled(name, value, classes) for name, value in option.items()}
            for option in self.options
        ]


def _scaled(name: str, value: float, classes: int) -> float:
    if name not in ("entropy_weight", "auxiliary_weight"):
        return value
    return float(f"{class_scale(classes) * value:.2g}")


def _logits(classes, seed, l2):
    return keras.layers.Dense(
        classes,
        kernel_initializer=keras.initializers.GlorotUniform(seed),
        kernel_regularizer=decay(l2),
        bias_regularizer=decay(l2),
    )


def _logits_head(make_loss, classes, seed, l2, **settings):
    return _logits(classes, seed, l2), make_loss(seed=seed, **settings)


def _dropmax_head(classes, seed, l2, head_class=DropMaxHead, **settings):
    # As in the authors' code, the retain branch has no weight decay.
    regularizers = {"kernel_regularizer": decay(l2), "bias_regularizer": decay(l2)}
    return head_class(classes, seed=seed, **regularizers, **settings), DropMaxLoss()


def _cross_entropy(seed):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _sparsemax_loss(seed):
    return SparsemaxLoss()


def _predict(model, x):
    return model.predict(x, batch_size=500, verbose=0)


def _logits_of_head(model, x):
    features, head = model.layers
    return head(_predict(features, x), output="logits").numpy()


def _softmax_of_logits(model, x):
    return tf.nn.log_softmax(_predict(model, x)).numpy()


def _log(probabilities):
    return np.log(np.maximum(probabilities, np.finfo("float32").tiny))


def _sparsemax_of_logits(model, x):
    return _log(sparsemax(_predict(model, x)).numpy())


def _in_mode(mode, samples, model, x):
    with predict_mode(model, mode, samples):
        return _predict(model, x)


# The weight decays, and the L2 penalties of the features. The first are the defaults.
DECAYS = (1e-4, 1e-3, 1e-2, 3e-3, 0.0, 3e-4, 3e-2, 3e-5, 1e-5)
FEATURE_DECAYS = (0.0, 0.01, 0.001, 0.1)

_SOFTMAX = {"(2)": _softmax_of_logits}
_MODES = {
    "(17) S=30": partial(_in_mode, "sampled", 30),
    "(17) S=100": partial(_in_mode, "sampled", 100),
    "(18)": partial(_in_mode, "expected", 1),
    "(16)": partial(_in_mode, "exact", 1),
    "(2)": partial(_in_mode, "softmax", 1),
}
_EXPECTED_FIRST = {"(18)": _MODES["(18)"], **_MODES}
_FRACTIONS = (0.4, 0.2, 0.6)
_ENTROPY_WEIGHTS = [{"entropy_weight": weight} for weight in (1.0, 3.0, 0.1, 10.0)]


def _sampled(sampler):
    return System(
        partial(_logits_head, partial(SampledSoftmaxLoss, sampler=sampler)),
        _SOFTMAX,
        [{"sample_fraction": fraction} for fraction in _FRACTIONS],
        _predict,
    )


# The systems of the paper.
SYSTEMS = {
    "base": System(partial(_logits_head, _cross_entropy), _SOFTMAX, [{}], _predict),
    "sampled-uniform": _sampled("uniform"),
    "sampled-learned": _sampled("learned_unigram"),
    "sparsemax": System(
        partial(_logits_head, _sparsemax_loss),
        {"sparsemax": _sparsemax_of_logits},
        [{}],
        _predict,
    ),
    "attention": System(
        partial(_dropmax_head, stochastic=False),
        {"(18)": _MODES["(18)"]},
        _ENTROPY_WEIGHTS,
        _logits_of_head,
    ),
    "random": System(
        _dropmax_head,
        {name: _MODES[name] for name in ("(17) S=30", "(17) S=100", "(18)", "(2)")},
        [{"retain_probability": fraction} for fraction in _FRACTIONS],
        _logits_of_head,
    ),
    "adaptive": System(_dropmax_head, _EXPECTED_FIRST, _ENTROPY_WEIGHTS, _logits_of_head),
    "label": System(
        partial(_dropmax_head, posterior="label"),
        _EXPECTED_FIRST,
        [
            {"auxiliary_weight": auxiliary, "entropy_weight": entropy}
            for auxiliary, entropy in ((0.1, 1.0), (0.1, 3.0), (1.0, 1.0), (0.1, 0.1))
        ],
        _logits_of_head,
    ),
}


def _smoothed(classes, seed, l2, label_smoothing):
    return _logits(classes, seed, l2), peers.smoothed_cross_entropy(label_smoothing)


def _focal(classes, seed, l2, gamma):
    return _logits(classes, seed, l2), peers.focal_loss(gamma)


def _after(layer, classes, seed, l2):
    return keras.Sequential([layer, _logits(classes, seed, l2)]), _cross_entropy(seed)


def _dropout(classes, seed, l2, rate):
    return _after(keras.layers.Dropout(rate, seed=seed), classes, seed, l2)


def _mean_over_dropout(samples, model, x):
    # The masks are those of the dropout before the logits, so the features are computed once.
    features, head = model.layers
    features, total = _predict(features, x), 0
    for _ in range(samples):
        total += tf.nn.softmax(head(features, training=True)).numpy()
    return _log(total / samples)


def _heteroscedastic(classes, seed, l2, temperature):
    regularizers: dict[str, Any] = {
        "kernel_regularizer": decay(l2),
        "bias_regularizer": decay(l2),
    }
    head = peers.HeteroscedasticHead(classes, temperature, seed=seed, **regularizers)
    return head, DropMaxLoss()


def _mean_logits(model, x):
    features, head = model.layers
    return head.branches[0](_predict(features, x)).numpy()


# Other ways to improve the accuracy or the calibration of a softmax, and that softmax.
PEERS = {
    "base": SYSTEMS["base"],
    "label-smoothing": System(
        _smoothed, _SOFTMAX, [{"label_smoothing": amount} for amount in (0.1, 0.05, 0.2)], _predict
    ),
    "focal": System(_focal, _SOFTMAX, [{"gamma": gamma} for gamma in (2.0, 1.0, 3.0)], _predict),
    "mc-dropout": System(
        _dropout,
        {
            "S=30": partial(_mean_over_dropout, 30),
            "S=100": partial(_mean_over_dropout, 100),
            **_SOFTMAX,
        },
        [{"rate": rate} for rate in (0.5, 0.2, 0.7)],
        _predict,
    ),
    "heteroscedastic": System(
        _heteroscedastic,
        {"S=30": _predict},
        [{"temperature": t} for t in (1.0, 0.5, 2.0)],
        _mean_logits,
    ),
}

_ablated_head = partial(_dropmax_head, head_class=AblatedHead)
_ablated = {name: _MODES[name] for name in ("(18)", "(16)", "(2)")}


def _ablation(masks, kl, entropy):
    parts = {"masks": masks, "kl": kl}
    name = "+".join(name for name, on in {**parts, "entropy": entropy}.items() if on)
    weights = _ENTROPY_WEIGHTS if entropy else [{"entropy_weight": 0.0}]
    options = [{**parts, **each} for each in weights]
    return name or "nothing", System(_ablated_head, _ablated, options, _logits_of_head)


def _label(**settings):
    build = partial(_ablated_head, posterior="label")
    return System(build, _ablated, [settings], _logits_of_head)


# Every combination of the three parts of (15), the entropy term beside a plain softmax, and the
# label posterior without one of its four parts.
ABLATIONS = dict(_ablation(*parts) for parts in product((False, True), repeat=3))
ABLATIONS["softmax-entropy"] = System(
    partial(_ablated_head, retain=False),
    {"(2)": _MODES["(2)"]},
    _ENTROPY_WEIGHTS,
    _logits_of_head,
)
ABLATIONS |= {
    "label-all": _label(),
    "label-no-masks": _label(masks=False),
    "label-no-kl": _label(kl=False),
    "label-no-entropy": _label(entropy_weight=0.0),
    "label-no-auxiliary": _label(auxiliary_weight=0.0),
}

GROUPS = {"paper": SYSTEMS, "parts": ABLATIONS, "peers": PEERS}
ALL = {name: system for group in GROUPS.values() for name, system in group.items()}
