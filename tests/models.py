"""Small models with a head, and what several tests do with them."""

import keras
import numpy as np

from tf_dropmax import DropMaxHead, DropMaxLoss, functional

DETERMINISTIC = ["expected", "exact", "softmax"]
MODES = [*DETERMINISTIC, "sampled"]
VARIANTS = {
    "prior": {},
    "label": {"posterior": "label"},
    "label-means": {"posterior": "label", "stochastic": False},
    "attention": {"stochastic": False},
    "random": {"retain_probability": 0.4},
}
GLOROT = {"kernel_initializer": "glorot_uniform"}  # of the retain branch, as in the paper
PAPER_START: dict = {"retain": GLOROT, "warmup_steps": 0}


def head_with(classes, *branches, **kwargs):
    """A head with given weights: for each branch its kernel, in the order of `head.branches`."""
    head = DropMaxHead(classes, **{"warmup_steps": 0, **kwargs})
    head.build((None, len(branches[0])))
    for branch, kernel in zip(head.branches.values(), branches, strict=True):
        branch.kernel.assign(kernel)
    return head


def selecting_head(classes, **kwargs):
    """A head whose features are the logits of all branches, side by side."""
    count = 3 if kwargs.get("posterior") == "label" else 2
    return head_with(classes, *np.split(np.eye(count * classes), count, axis=1), **kwargs)


def classifier(compiled=None, **kwargs):
    """A model whose modes differ by more than 1e-2 in some log-probability."""
    start = keras.initializers.RandomNormal(stddev=1.5, seed=3)
    head = DropMaxHead(4, seed=1, retain={"kernel_initializer": start}, **kwargs)
    hidden = keras.layers.Dense(8, "relu", kernel_initializer=keras.initializers.HeNormal(0))
    model = keras.Sequential([keras.Input((6,)), hidden, head])
    if compiled is not None:
        model.compile("sgd", DropMaxLoss(), **compiled)
    return model


def by_functional(model, x):
    """What the deterministic modes of `classifier` give, by pure functions and NumPy products."""
    hidden, head = model.layers
    h = np.maximum(x @ hidden.kernel.numpy() + hidden.bias.numpy(), 0)
    logits, retain_logits = (
        h @ head.branches[name].kernel.numpy() + head.branches[name].bias.numpy()
        for name in ("classes", "retain")
    )
    log_p = {
        "expected": functional.expected_log_probabilities(logits, retain_logits).numpy(),
        "exact": functional.exact_log_probabilities(logits, retain_logits).numpy(),
        "softmax": functional.softmax_log_probabilities(logits).numpy(),
    }
    for one, other in [("expected", "exact"), ("exact", "softmax"), ("softmax", "expected")]:
        assert np.abs(log_p[one] - log_p[other]).max() > 1e-2
    return log_p


def mean_nll(log_p, y):
    return -log_p[np.arange(len(y)), y].mean()


def count_traces(model, monkeypatch):
    """Counts how often the Python code of the head runs from here on."""
    head = model.layers[-1]
    traces, call = [], head.call
    monkeypatch.setattr(head, "call", lambda *a, **k: traces.append(1) or call(*a, **k))
    return traces
