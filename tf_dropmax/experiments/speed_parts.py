"""The measurements of speed and memory, part by part.

Every function yields rows. A row is a dictionary of `"what"`, a description, and the numbers of
each contender: `{"ms": time, "MiB": peak memory, "ratio": ratio to the first contender, "goal": the
largest ratio that is wanted}`. A row of accuracy has `"error"`, a float, instead of contenders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax import DropMaxHead, DropMaxLoss, functional
from tf_dropmax.experiments import networks
from tf_dropmax.experiments.peak_memory import peak
from tf_dropmax.experiments.speed_heads import (
    BATCH,
    FEATURES,
    cross_entropy,
    heads_and_losses,
    training_steps,
)
from tf_dropmax.experiments.systems import PEERS, SYSTEMS, System
from tf_dropmax.experiments.timing import paired

Rows = Iterator[dict[str, Any]]

_THREE_PRODUCTS = ("Dense(3T)", "label")
_MODES = (
    ("expected", "expected", 1),
    ("sampled, S = 30", "sampled", 30),
    ("sampled, S = 100", "sampled", 100),
    ("exact", "exact", 1),
)


def head(classes: Sequence[int], policies: Sequence[str], repeats: int) -> Rows:
    """Forward and backward pass of the head alone.

    `posterior="label"` has three matrix products, so its baseline has too.
    """
    two_products = [name for name in heads_and_losses(2, "float32") if name not in _THREE_PRODUCTS]
    compared = ((two_products, "DropMax", (1.25, 1.08)), (_THREE_PRODUCTS, "label", (1.35, 1.1)))
    for policy in policies:
        for count in classes:
            for compiled in (False, True):
                what = f"T = {count}, {policy}{_xla(compiled)}"
                for names, contender, goals in compared:
                    steps = training_steps(count, policy, compiled, names)
                    row = {"what": what, **paired(steps, repeats)}
                    yield _with_goal(row, contender, goals[compiled]) if count >= 1000 else row


def _with_goal(row, contender, goal):
    return {**row, contender: {**row[contender], "goal": goal}}


def compilation(classes: Sequence[int] = (10, 1000), repeats: int = 3) -> Rows:
    """The first training step with XLA: tracing, compilation and one step.

    It is that of the head alone, and that of LeNet as a Keras model.
    """
    names = ("Dense(2T)", "DropMax", "label")
    for what, first_step in (("the head", _first_step), ("LeNet", _first_step_of_lenet)):
        for count in classes:
            functions = {name: partial(first_step, count, name) for name in names}
            row = {"what": f"first step of {what}, T = {count}, XLA", **paired(functions, repeats)}
            for name in names[1:]:
                row = _with_goal(row, name, 2.0)
            yield row


def _first_step(classes, name):
    (step,) = training_steps(classes, compiled=True, names=[name]).values()
    return step()


def _first_step_of_lenet(classes, name):
    head, loss = heads_and_losses(classes, "float32")[name]
    model = keras.Sequential([networks.lenet((28, 28, 1), 0), head])
    model.compile("adam", loss, jit_compile=True)
    return model.train_on_batch(np.zeros((100, 28, 28, 1), "float32"), np.zeros(100))


def network(repeats: int) -> Rows:
    """Training steps of Keras models. Keras decides whether XLA compiles them."""
    draw = np.random.default_rng(0)
    for name, make, shape in (
        ("tutorial CNN, 28 x 28", networks.tutorial_cnn, (28, 28, 1)),
        ("ResNet-34, 32 x 32", networks.resnet34, (32, 32, 3)),
    ):
        x, y = draw.random((50, *shape), "float32"), draw.integers(10, size=50)
        heads = {
            "Dense softmax": (keras.layers.Dense(10), cross_entropy()),
            "DropMax": (DropMaxHead(10), DropMaxLoss()),
            "label": (DropMaxHead(10, posterior="label"), DropMaxLoss()),
        }
        steps = {
            contender: _training_step(make(shape, 0), *each, x, y)
            for contender, each in heads.items()
        }
        yield {"what": f"training step, batch 50, {name}", **paired(steps, repeats)}


def systems(
    repeats: int,
    make: Callable[..., keras.Model] = networks.lenet,
    compared: dict[str, System] = SYSTEMS | PEERS,
) -> Rows:
    """Training steps of a network with every system of `table1`, one row for each system."""
    draw = np.random.default_rng(0)
    for classes in (10, 242):
        x, y = draw.random((100, 28, 28, 1), "float32"), draw.integers(classes, size=100)
        steps = {}
        for name, system in compared.items():
            head, loss = system.build(classes, 0, 0.0, **system.options_for(classes)[0])
            steps[name] = _training_step(make((28, 28, 1), 0, 0.0), head, loss, x, y)
        measured = paired(steps, repeats)
        for name in list(steps)[1:]:
            what = f"training step, T = {classes}: {name}"
            yield {"what": what, "base": measured["base"], "system": measured[name]}


def _training_step(features, head, loss, x, y):
    model = keras.Sequential([features, head])
    model.compile("adam", loss)
    return partial(model.train_on_batch, x, y)


def predict(repeats: int) -> Rows:
    """The test-time modes: their times, and the errors of their probabilities."""
    draw = np.random.default_rng(0)
    for count in (10, 1000, 10_000):
        x = tf.Variable(draw.normal(size=(BATCH, FEATURES)).astype("float32"))
        for compiled in (False, True):
            dense = keras.layers.Dense(2 * count, "softmax")
            functions = {"Dense(2T), softmax": _forward(dense, x, compiled)}
            for name, mode, samples in _MODES[:1] if compiled else _MODES:
                head = DropMaxHead(count, predict_mode=mode, predict_samples=samples)
                functions[name] = _forward(head, x, compiled)
            what = f"head, batch {BATCH}, T = {count}{_xla(compiled)}"
            row = {"what": what, **paired(functions, repeats)}
            yield row if compiled or count < 1000 else _with_goal(row, "expected", 1.1)
    x = tf.Variable(draw.random((500, 28, 28, 1), "float32"))
    features, functions = networks.tutorial_cnn((28, 28, 1), 0), {}
    for name, mode, samples in _MODES:
        head = DropMaxHead(10, predict_mode=mode, predict_samples=samples)
        functions[name] = _forward(keras.Sequential([features, head]), x)
    row = {"what": "tutorial CNN, batch 500, T = 10", **paired(functions, repeats)}
    yield _with_goal(row, "exact", 1.1)
    yield from _errors(*(3 * draw.normal(size=(2, BATCH, 1000))))


def _errors(logits: np.ndarray, retain_logits: np.ndarray) -> Rows:
    """The errors of estimates in float32, against the quadrature in float64 (good to 1e-12)."""
    reference = np.exp(functional.exact_log_probabilities(logits, retain_logits))
    small = logits.astype("float32"), retain_logits.astype("float32")
    estimates = {
        "exact": functional.exact_log_probabilities(*small),
        "sampled, S = 30": functional.sampled_log_probabilities(*small, samples=30),
        "sampled, S = 100": functional.sampled_log_probabilities(*small, samples=100),
    }
    for name, log_p in estimates.items():
        error = float(np.abs(np.exp(log_p) - reference).max())
        yield {"what": f"largest error of a probability, T = 1000: {name}", "error": error}


def _forward(layer, x, compiled=False):
    return partial(tf.function(layer, jit_compile=compiled), x)


def memory(classes: int, names: Sequence[str] = ("Dense(2T)", "DropMax", "label", "naive")) -> Rows:
    """Peak memory of a training step: the median of three processes.

    The order in which a graph happens to run changes the peak.
    """
    for compiled in (False, True):
        row: dict[str, Any] = {
            "what": f"peak memory of a training step, T = {classes}{_xla(compiled)}"
        }
        for name in names:
            row[name] = {"MiB": median(peak(classes, name, compiled)[0] for _ in range(3))}
            row[name]["ratio"] = row[name]["MiB"] / max(row[names[0]]["MiB"], 1)
        yield row if compiled else _with_goal(row, "DropMax", 1.4)


def growth(counts: Sequence[int] = (125_000, 250_000, 500_000, 1_000_000), batch: int = 8) -> Rows:
    """Time and peak memory of a training step with very many classes."""
    for classes in counts:
        row: dict[str, Any] = {"what": f"T = {classes}, batch {batch}", "classes": classes}
        for name in ("Dense(2T)", "DropMax"):
            memory, seconds = peak(classes, name, batch=batch)
            row[name] = {"MiB": memory, "ms": 1000 * seconds}
        row["DropMax"]["ratio"] = row["DropMax"]["ms"] / row["Dense(2T)"]["ms"]
        yield row


def _xla(compiled):
    return ", XLA" if compiled else ""
