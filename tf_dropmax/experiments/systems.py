"""The systems that the paper compares: head and loss, what is measured of each, and what is searched for each."""

from functools import partial
from itertools import product
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax import DropMaxHead, DropMaxLoss, SampledSoftmaxLoss, SparsemaxLoss, functional, predict_mode, sparsemax
from tf_dropmax.experiments.networks import decay


class System(NamedTuple):
    """`build(classes, seed, l2, **settings)` gives head and loss; `rows` name the ways to predict.

    A search chooses among `DECAYS`, which are the same for every system, and `options`, the settings that a system has of
    its own; the first of these are its defaults. It goes by the measures of the first row.
    """

    build: callable
    rows: dict
    options: list


def _logits_head(make_loss, classes, seed, l2, **settings):
    initializer = keras.initializers.GlorotUniform(seed)
    regularizers = {"kernel_regularizer": decay(l2), "bias_regularizer": decay(l2)}
    return keras.layers.Dense(classes, kernel_initializer=initializer, **regularizers), make_loss(seed=seed, **settings)


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


_MODES = {
    "(17) S=30": partial(_in_mode, "sampled", 30),
    "(17) S=100": partial(_in_mode, "sampled", 100),
    "(18)": partial(_in_mode, "expected", 1),
    "(16)": partial(_in_mode, "exact", 1),
    "(2)": partial(_in_mode, "softmax", 1),
}
DECAYS = (1e-4, 1e-3, 1e-2, 0.0, 3e-3, 3e-4)

_FRACTIONS = (0.4, 0.2, 0.6)
_ENTROPY_WEIGHTS = [{"entropy_weight": weight} for weight in (1.0, 3.0, 0.1, 10.0)]


def _sampled(sampler):
    return System(
        partial(_logits_head, partial(SampledSoftmaxLoss, sampler=sampler)),
        {"(2)": _softmax_of_logits},
        [{"sample_fraction": fraction} for fraction in _FRACTIONS],
    )


SYSTEMS = {
    "base": System(partial(_logits_head, _cross_entropy), {"(2)": _softmax_of_logits}, [{}]),
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


class AblatedHead(DropMaxHead):
    """Adaptive DropMax with parts of its objective (15) switched off.

    Args:
        masks: Bool. `False`: the masks of the non-targets are replaced by their means.
        kl: Bool. `False`: no KL divergence (10), that is, no `-log rho_y`.
        **kwargs: As for `DropMaxHead`; `entropy_weight=0.0` switches off the third part.
    """

    def __init__(self, *args, masks=True, kl=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.masks = masks
        self.kl = kl

    def _scores(self, logits, features, mask):
        scores = super()._scores(logits, features, mask)
        retain_logits = self._retain_logits(features, logits)
        if not self.masks:
            scores = functional.scores(logits, retain_logits, retain_logits, self.entropy_weight)
        return scores if self.kl else scores - tf.math.log_sigmoid(retain_logits)


def _ablation(masks, kl, entropy):
    settings = {"masks": masks, "kl": kl, "entropy_weight": float(entropy)}
    parts = [name for name, on in {"masks": masks, "kl": kl, "entropy": entropy}.items() if on]
    build = partial(_dropmax_head, head_class=AblatedHead)
    return "+".join(parts) or "nothing", System(build, {key: _MODES[key] for key in ("(18)", "(16)", "(2)")}, [settings])


# Every combination of the three parts of (15).
ABLATIONS = dict(_ablation(*parts) for parts in product((False, True), repeat=3))
