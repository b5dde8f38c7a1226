"""The systems that are compared: head and loss, what is measured of each, and what is searched for each."""

from functools import partial
from itertools import product
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax import DropMaxHead, DropMaxLoss, SampledSoftmaxLoss, SparsemaxLoss, functional, predict_mode, sparsemax
from tf_dropmax.experiments import peers
from tf_dropmax.experiments.networks import decay


class System(NamedTuple):
    """`build(classes, seed, l2, **settings)` gives head and loss; `rows` name the ways to predict.

    A search chooses among `DECAYS`, which are the same for every system, and `options`, the settings that a system has of its
    own, here for up to 30 classes; the first of these are its defaults. It goes by the measures of the first row.
    `fit(log_probabilities, labels)` gives settings that are not searched but fitted, after training, to what the first row
    predicts for validation data.
    """

    build: callable
    rows: dict
    options: list
    fit: callable = None

    def options_for(self, classes):
        """Beyond 30 classes, weights of what is summed over classes fall in proportion, as do the defaults of the head."""
        scale = min(1.0, 30 / classes)
        summed = ("entropy_weight", "auxiliary_weight")
        return [{k: float(f"{scale * v:.2g}") if k in summed else v for k, v in each.items()} for each in self.options]


def _logits(classes, seed, l2):
    initializer = keras.initializers.GlorotUniform(seed)
    return keras.layers.Dense(classes, kernel_initializer=initializer, kernel_regularizer=decay(l2), bias_regularizer=decay(l2))


def _logits_head(make_loss, classes, seed, l2, **settings):
    return _logits(classes, seed, l2), make_loss(seed=seed, **settings)


def _dropmax_head(classes, seed, l2, head_class=DropMaxHead, **settings):
    # As in the authors' code, the retain branch is not decayed.
    head = head_class(classes, seed=seed, kernel_regularizer=decay(l2), bias_regularizer=decay(l2), **settings)
    return head, DropMaxLoss()


def _cross_entropy(seed):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _sparsemax_loss(seed):
    return SparsemaxLoss()


def _predict(model, x):
    return model.predict(x, batch_size=500, verbose=0)


def _softmax_of_logits(model, x):
    return tf.nn.log_softmax(_predict(model, x)).numpy()


def _sparsemax_of_logits(model, x):
    return np.log(np.maximum(sparsemax(_predict(model, x)).numpy(), np.finfo("float32").tiny))


def _in_mode(mode, samples, model, x):
    with predict_mode(model, mode, samples):
        return _predict(model, x)


_SOFTMAX = {"(2)": _softmax_of_logits}
_MODES = {
    "(17) S=30": partial(_in_mode, "sampled", 30),
    "(17) S=100": partial(_in_mode, "sampled", 100),
    "(18)": partial(_in_mode, "expected", 1),
    "(16)": partial(_in_mode, "exact", 1),
    "(2)": partial(_in_mode, "softmax", 1),
}
_SOFTMAX_MODE = {"(2)": _MODES["(2)"]}
DECAYS = (1e-4, 1e-3, 1e-2, 0.0, 3e-3, 3e-4)

_FRACTIONS = (0.4, 0.2, 0.6)
_ENTROPY_WEIGHTS = [{"entropy_weight": weight} for weight in (1.0, 3.0, 10.0, 0.1)]


def _sampled(sampler):
    return System(
        partial(_logits_head, partial(SampledSoftmaxLoss, sampler=sampler)),
        _SOFTMAX,
        [{"sample_fraction": fraction} for fraction in _FRACTIONS],
    )


SYSTEMS = {
    "base": System(partial(_logits_head, _cross_entropy), _SOFTMAX, [{}]),
    "sampled-uniform": _sampled("uniform"),
    "sampled-learned": _sampled("learned_unigram"),
    "sparsemax": System(partial(_logits_head, _sparsemax_loss), {"sparsemax": _sparsemax_of_logits}, [{}]),
    "attention": System(partial(_dropmax_head, stochastic=False), {"(18)": _MODES["(18)"]}, _ENTROPY_WEIGHTS),
    "random": System(
        _dropmax_head,
        {key: _MODES[key] for key in ("(17) S=30", "(17) S=100", "(18)", "(2)")},
        [{"retain_probability": fraction} for fraction in _FRACTIONS],
    ),
    "adaptive": System(_dropmax_head, {"(18)": _MODES["(18)"], **_MODES}, _ENTROPY_WEIGHTS),
    "label": System(
        partial(_dropmax_head, posterior="label"),
        {"(18)": _MODES["(18)"], **_MODES},
        [{"auxiliary_weight": a, "entropy_weight": e} for a, e in ((0.1, 1.0), (1.0, 1.0), (0.1, 3.0), (1.0, 3.0))],
    ),
}


def _smoothed(classes, seed, l2, label_smoothing):
    return _logits(classes, seed, l2), peers.smoothed_cross_entropy(label_smoothing)


def _focal(classes, seed, l2, gamma):
    return _logits(classes, seed, l2), peers.focal_loss(gamma)


def _cooled(classes, seed, l2, temperature=1.0):
    return keras.Sequential([_logits(classes, seed, l2), peers.Cooled(temperature)]), _cross_entropy(seed)


def _fit_temperature(log_probabilities, labels):
    return {"temperature": round(peers.best_temperature(log_probabilities, labels), 4)}


def _dropout(classes, seed, l2, rate):
    return keras.Sequential([keras.layers.Dropout(rate, seed=seed), _logits(classes, seed, l2)]), _cross_entropy(seed)


def _mean_over_dropout(samples, model, x):
    """Only the dropout before the logits is drawn, so that the features are computed once."""
    features, head = model.layers
    features, total = _predict(features, x), 0
    for _ in range(samples):
        total += tf.nn.softmax(head(features, training=True)).numpy()
    return np.log(np.maximum(total / samples, np.finfo("float32").tiny))


def _heteroscedastic(classes, seed, l2, temperature):
    regularizers = {"kernel_regularizer": decay(l2), "bias_regularizer": decay(l2)}
    return peers.HeteroscedasticHead(classes, temperature, seed=seed, **regularizers), DropMaxLoss()


def _features_decayed(classes, seed, l2, feature_decay):
    return (
        keras.Sequential([keras.layers.ActivityRegularization(l2=feature_decay), _logits(classes, seed, l2)]),
        _cross_entropy(seed),
    )


# What else is done to a softmax for accuracy or calibration, and that softmax.
PEERS = {
    "base": SYSTEMS["base"],
    "label-smoothing": System(_smoothed, _SOFTMAX, [{"label_smoothing": amount} for amount in (0.1, 0.05, 0.2)]),
    "focal": System(_focal, _SOFTMAX, [{"gamma": gamma} for gamma in (2.0, 1.0, 3.0)]),
    "temperature": System(_cooled, _SOFTMAX, [{}], _fit_temperature),
    "mc-dropout": System(
        _dropout,
        {"S=30": partial(_mean_over_dropout, 30), "S=100": partial(_mean_over_dropout, 100), "(2)": _softmax_of_logits},
        [{"rate": rate} for rate in (0.5, 0.2, 0.7)],
    ),
    "heteroscedastic": System(_heteroscedastic, {"S=30": _predict}, [{"temperature": t} for t in (1.0, 0.5, 2.0)]),
    "feature-decay": System(_features_decayed, _SOFTMAX, [{"feature_decay": decay} for decay in (0.01, 0.001, 0.1)]),
}


class AblatedHead(DropMaxHead):
    """Adaptive DropMax with parts of its objective (15) switched off.

    Args:
        masks: Bool. `False`: the masks of the non-targets are replaced by their means.
        kl: Bool. `False`: no KL divergence (10), that is, no `-log rho_y`.
        retain: Bool. `False`: the retain branch is there, and has its entropy term, but the prediction is the plain softmax
            (2), in training too; needs `kl=False`.
        **kwargs: As for `DropMaxHead`; `entropy_weight=0.0` switches off the third part.
    """

    def __init__(self, *args, masks=True, kl=True, retain=True, **kwargs):
        super().__init__(*args, predict_mode="expected" if retain else "softmax", **kwargs)
        self.masks = masks
        self.kl = kl
        self.retain = retain

    def _scores(self, logits, features, mask):
        scores = super()._scores(logits, features, mask)
        if not self.retain:
            return functional.softmax(logits)
        retain_logits = self._retain_logits(features, logits)
        if not self.masks:
            scores = functional.scores(logits, retain_logits, retain_logits, self.entropy_weight)
        return scores if self.kl else scores - tf.math.log_sigmoid(retain_logits)


def _ablation(masks, kl, entropy):
    settings = {"masks": masks, "kl": kl}
    parts = [name for name, on in {**settings, "entropy": entropy}.items() if on]
    build = partial(_dropmax_head, head_class=AblatedHead)
    options = [{**settings, **weight} for weight in (_ENTROPY_WEIGHTS if entropy else [{"entropy_weight": 0.0}])]
    return "+".join(parts) or "nothing", System(build, {key: _MODES[key] for key in ("(18)", "(16)", "(2)")}, options)


# Every combination of the three parts of (15); and the entropy term beside a plain softmax, which has no use for the branch.
ABLATIONS = dict(_ablation(*parts) for parts in product((False, True), repeat=3))
ABLATIONS["softmax, entropy"] = System(
    partial(_dropmax_head, head_class=AblatedHead, masks=False, kl=False, retain=False), _SOFTMAX_MODE, _ENTROPY_WEIGHTS
)

GROUPS = {"paper": SYSTEMS, "parts": ABLATIONS, "peers": PEERS}
ALL = {name: system for group in GROUPS.values() for name, system in group.items()}
