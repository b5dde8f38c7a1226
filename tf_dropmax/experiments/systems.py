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


class System(NamedTuple):
    """A head with its loss.

    Attributes:
        build: Function `build(classes, seed, l2, **settings)` that returns a head and a loss.
        rows: `{name: predict}`, the ways to predict. `predict(model, x)` returns log-probabilities,
            an array `(N, T)`. A search compares the first.
        options: List of the system's own settings, for up to 30 classes. The first are its
            defaults. A search also chooses among `DECAYS` and `FEATURE_DECAYS`, which are the
            same for every system.
    """

    build: Callable[..., tuple[keras.layers.Layer, Callable]]
    rows: Mapping[str, Callable[[keras.Model, np.ndarray], np.ndarray]]
    options: list[dict[str, Any]]

    def options_for(self, classes: int) -> list[dict[str, Any]]:
        """The options for a number of classes.

        Weights of terms that are sums over classes are scaled like the defaults of `DropMaxHead`.
        """
        scale = min(1.0, 30 / classes)
        return [
            {
                name: float(f"{scale * value:.2g}") if name.endswith("_weight") else value
                for name, value in option.items()
            }
            for option in self.options
        ]


def _decays(l2):
    return {"kernel_regularizer": decay(l2), "bias_regularizer": decay(l2)}


def _cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _softmax(classes, seed, l2, make_loss=_cross_entropy, **settings):
    initializer = keras.initializers.GlorotUniform(seed)
    dense = keras.layers.Dense(classes, kernel_initializer=initializer, **_decays(l2))
    return dense, make_loss(**settings)


# The start of the retain and the auxiliary branch in the paper and in the authors' code.
_PAPER_START = {"retain": {"kernel_initializer": "glorot_uniform"}, "warmup_steps": 0}


def _dropmax(classes, seed, l2, head_class=DropMaxHead, paper_start=False, **settings):
    # As in the authors' code, the retain branch has no weight decay.
    start = _PAPER_START if paper_start else {}
    head = head_class(classes, seed=seed, **_decays(l2), **start, **settings)
    return head, DropMaxLoss()


def _predict(model, x):
    return model.predict(x, batch_size=500, verbose=0)


def logits(model: keras.Model, x: np.ndarray) -> np.ndarray:
    """The logits of a network with a DropMax head, and the outputs of another one."""
    features, head = model.layers
    if isinstance(head, DropMaxHead):
        return head(_predict(features, x), output="logits").numpy()
    return _predict(model, x)


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
_EXPECTED = {"(18)": _MODES["(18)"]}
_EXPECTED_FIRST = {**_EXPECTED, **_MODES}
_FRACTIONS = (0.4, 0.2, 0.6)
_ENTROPY_WEIGHTS = [{"entropy_weight": weight} for weight in (1.0, 3.0, 0.1, 10.0)]
_LABEL_WEIGHTS = [
    {"auxiliary_weight": auxiliary, "entropy_weight": entropy}
    for auxiliary, entropy in ((0.1, 1.0), (0.1, 3.0), (1.0, 1.0), (0.1, 0.1))
]


def _sampled(sampler):
    def build(classes, seed, l2, **settings):
        make_loss = partial(SampledSoftmaxLoss, sampler=sampler, seed=seed)
        return _softmax(classes, seed, l2, make_loss, **settings)

    fractions = [{"sample_fraction": fraction} for fraction in _FRACTIONS]
    return System(build, _SOFTMAX, fractions)


_BASE = {"softmax": System(_softmax, _SOFTMAX, [{}])}


def _variants(paper_start):
    """Attention, `prior` and `label`, from the default start or that of the paper."""
    build = partial(_dropmax, paper_start=paper_start)
    attention, label = partial(build, stochastic=False), partial(build, posterior="label")
    suffix = "-paper-start" if paper_start else ""
    systems = {
        "attention": System(attention, _EXPECTED, _ENTROPY_WEIGHTS),
        "prior": System(build, _EXPECTED_FIRST, _ENTROPY_WEIGHTS),
        "label": System(label, _EXPECTED_FIRST, _LABEL_WEIGHTS),
    }
    return {name + suffix: system for name, system in systems.items()}


# The systems of the paper, with the paper's start.
SYSTEMS = {
    **_BASE,
    "sampled-uniform": _sampled("uniform"),
    "sampled-learned": _sampled("learned_unigram"),
    "sparsemax": System(
        partial(_softmax, make_loss=SparsemaxLoss), {"sparsemax": _sparsemax_of_logits}, [{}]
    ),
    "random": System(
        _dropmax,
        {name: _MODES[name] for name in ("(17) S=30", "(17) S=100", "(18)", "(2)")},
        [{"retain_probability": fraction} for fraction in _FRACTIONS],
    ),
    **_variants(paper_start=True),
}


def _dropout(classes, seed, l2, rate):
    dense, loss = _softmax(classes, seed, l2)
    return keras.Sequential([keras.layers.Dropout(rate, seed=seed), dense]), loss


def _mean_over_dropout(samples, model, x):
    # The masks are those of the dropout before the logits, so the features are computed once.
    features, head = model.layers
    features, total = _predict(features, x), 0
    for _ in range(samples):
        total += tf.nn.softmax(head(features, training=True)).numpy()
    return _log(total / samples)


def _heteroscedastic(classes, seed, l2, temperature):
    head = peers.HeteroscedasticHead(classes, temperature, seed=seed, **_decays(l2))
    return head, _cross_entropy()  # Log-probabilities are logits, too.


# Other ways to improve the accuracy or the calibration of a softmax, and that softmax.
_DROPOUT_ROWS = {f"S={count}": partial(_mean_over_dropout, count) for count in (30, 100)}
_RATES = [{"rate": rate} for rate in (0.5, 0.2, 0.7)]
_AMOUNTS = [{"label_smoothing": amount} for amount in (0.1, 0.05, 0.2)]
_SMOOTHED = partial(_softmax, make_loss=peers.smoothed_cross_entropy)
_FOCAL = partial(_softmax, make_loss=peers.focal_loss)
PEERS = {
    **_BASE,
    "label-smoothing": System(_SMOOTHED, _SOFTMAX, _AMOUNTS),
    "focal": System(_FOCAL, _SOFTMAX, [{"gamma": gamma} for gamma in (2.0, 1.0, 3.0)]),
    "mc-dropout": System(_dropout, {**_DROPOUT_ROWS, **_SOFTMAX}, _RATES),
    "heteroscedastic": System(
        _heteroscedastic,
        {"S=30": _predict},
        [{"temperature": temperature} for temperature in (1.0, 0.5, 2.0)],
    ),
}

# One line changed, with default settings. `feature-decay` is a softmax with an L2 penalty on the
# features.
UNTUNED = {
    **{name: PEERS[name] for name in ("softmax", "label-smoothing", "focal", "mc-dropout")},
    "feature-decay": System(_softmax, _SOFTMAX, [{"feature_decay": 0.01}]),
    **_variants(paper_start=False),
}

_ablated = partial(_dropmax, head_class=AblatedHead, paper_start=True)
_ABLATED_ROWS = {name: _MODES[name] for name in ("(18)", "(16)", "(2)")}


def _ablation(masks, kl, entropy):
    parts = {"masks": masks, "kl": kl}
    name = "+".join(name for name, on in {**parts, "entropy": entropy}.items() if on)
    weights = _ENTROPY_WEIGHTS if entropy else [{"entropy_weight": 0.0}]
    options = [{**parts, **each} for each in weights]
    return name or "nothing", System(_ablated, _ABLATED_ROWS, options)


def _label(**settings):
    return System(partial(_ablated, posterior="label"), _ABLATED_ROWS, [settings])


# Every combination of the three parts of (15), the entropy term beside a plain softmax, and the
# label posterior without one of its four parts. All have the paper's start.
ABLATIONS = dict(_ablation(*parts) for parts in product((False, True), repeat=3))
ABLATIONS["softmax-entropy"] = System(
    partial(_ablated, beside_softmax=True), {"(2)": _MODES["(2)"]}, _ENTROPY_WEIGHTS
)
ABLATIONS |= {
    "label-all": _label(),
    "label-no-masks": _label(masks=False),
    "label-no-kl": _label(kl=False),
    "label-no-entropy": _label(entropy_weight=0.0),
    "label-no-auxiliary": _label(auxiliary_weight=0.0),
}

GROUPS = {"paper": SYSTEMS, "untuned": UNTUNED, "parts": ABLATIONS, "peers": PEERS}
ALL = {name: system for group in GROUPS.values() for name, system in group.items()}
