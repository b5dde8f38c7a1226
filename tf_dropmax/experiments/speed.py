"""What the head costs: times and memory as ratios to baselines, all measured in one run.

Every part yields rows. A row is a dictionary of `"what"`, a description, and the numbers of each
contender: `{"ms": time, "MiB": peak memory, "ratio": ratio to the first contender}`.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.box import MARKDOWN
from rich.table import Table

from tf_dropmax import DropMaxHead
from tf_dropmax.experiments import networks, runner
from tf_dropmax.experiments.console import wide_console, writing
from tf_dropmax.experiments.systems import ALL

PARTS = ("head", "compilation", "network", "predict", "memory")
CLASSES = (10, 100, 1000, 10_000, 50_000)
POLICIES = ("float32", "mixed_bfloat16")
BATCH, FEATURES = 256, 512

# The first of each group is the baseline, which has as many matrix products as `prior` or `label`.
_TWO_PRODUCTS = ("Dense(2T)", "Dense(T)", "prior", "attention", "random")
_THREE_PRODUCTS = ("Dense(3T)", "label")
_MODES = (("expected", 1), ("sampled", 30), ("sampled", 100), ("exact", 1))

Rows = Iterator[dict[str, Any]]


def run(
    parts: Sequence[str] = PARTS,
    classes: Sequence[int] = CLASSES,
    policies: Sequence[str] = POLICIES,
    repeats: int = 9,
    batch: int = BATCH,
    output: Path | str = "speed.json",
) -> dict[str, Any]:
    """Measures, prints tables, and writes the numbers.

    Args:
        parts: Sequence of names in `PARTS`, which are functions of this module. Defaults to all.
        classes: Sequence of positive ints, numbers of classes T for `"head"` and `"memory"`.
            Defaults to `CLASSES`.
        policies: Sequence of dtype policies for `"head"`. Defaults to `POLICIES`.
        repeats: Positive int, number of turns, of which the median is reported. Defaults to 9.
        batch: Positive int, number of examples for `"memory"`. Defaults to `BATCH`.
        output: Path of the file for the numbers. Defaults to `"speed.json"`.

    Returns:
        `{"environment": versions and device, part: [rows]}`.

    Raises:
        UserError: If the file cannot be written.
    """
    console, output = wide_console(), Path(output)
    results: dict[str, Any] = {"environment": runner.environment()}
    measure: dict[str, Rows] = {
        "head": head(classes, policies, repeats),
        "compilation": compilation(repeats=repeats),
        "network": network(repeats),
        "predict": predict(repeats),
        "memory": memory(classes, batch),
    }
    with writing(f"The results file {output}"):
        output.touch()
    for part in parts:
        results[part] = []
        for row in measure[part]:
            console.print(row["what"])
            results[part].append(row)
            output.write_text(json.dumps(results, indent=1))
        console.print(_table(part, results[part]))
    return results


def _table(part, rows):
    names = dict.fromkeys(name for row in rows for name in row if name != "what")
    table = Table("", *names, title=f"{part}: ratios to the first", box=MARKDOWN)
    for row in rows:
        table.add_row(row["what"], *(_cell(row[name]) if name in row else "" for name in names))
    return table


def _cell(value):
    numbers = ", ".join(f"{value[unit]:.3g} {unit}" for unit in ("ms", "MiB") if unit in value)
    return f"{value['ratio']:.2f} ({numbers})"


def head_and_loss(name: str, classes: int) -> tuple[keras.layers.Layer, Callable]:
    """A head with its loss, with the dtype policy that is in force.

    Args:
        name: A name in `ALL`, whose default settings are taken; or `"Dense(T)"`, `"Dense(2T)"` or
            `"Dense(3T)"`, a plain softmax with one, two or three times as many outputs.
        classes: Positive int, T.
    """
    products = {"Dense(T)": 1, "Dense(2T)": 2, "Dense(3T)": 3}
    if name in products:
        return ALL["softmax"].build(products[name] * classes, 0, 0.0)
    return ALL[name].build(classes, 0, 0.0, **ALL[name].options_for(classes)[0])


def training_step(
    name: str, classes: int, compiled: bool = False, batch: int = BATCH
) -> Callable[[], tuple[tf.Tensor, list[tf.Tensor]]]:
    """The forward and backward pass of a head on random features, the same for every head.

    Args:
        name, classes: As for `head_and_loss`.
        compiled: Bool, whether XLA compiles it. Defaults to `False`.
        batch: Positive int, number of examples. Defaults to `BATCH`.

    Returns:
        Function without arguments that returns the loss and its gradients with respect to the
        features and the weights.
    """
    draw = np.random.default_rng(0)
    x = tf.Variable(draw.normal(size=(batch, FEATURES)).astype("float32"))
    y = tf.Variable(draw.integers(classes, size=batch))
    head, loss = head_and_loss(name, classes)
    head.build(x.shape)

    @tf.function(jit_compile=compiled)
    def step():
        features = tf.identity(x)
        with tf.GradientTape() as tape:
            tape.watch(features)
            value = loss(y, head(features, training=True)) + sum(head.losses)
        return value, tape.gradient(value, [features, *head.trainable_variables])

    return step


def paired(
    functions: Mapping[str, Callable[[], Any]], repeats: int = 15, least: float = 0.05
) -> dict[str, dict[str, float]]:
    """Times functions in turns, so that all of them meet the same state of the machine.

    Args:
        functions: Dictionary of functions without arguments. The first is the baseline.
        repeats: Positive int, number of turns. Defaults to 15.
        least: Positive float, the shortest time in seconds that a function takes in a turn. A fast
            function is called several times. Defaults to 0.05.

    Returns:
        `{name: {"ms": median time of a call in milliseconds, "ratio": median ratio to the time of
        the baseline in the same turn}}`.
    """
    calls = {}
    for name, function in functions.items():
        _seconds(function)  # Traces a `tf.function`.
        calls[name] = max(1, round(least / _seconds(function)))
    turns = [
        {name: _seconds(function, calls[name]) for name, function in functions.items()}
        for _ in range(repeats)
    ]
    first = next(iter(functions))
    return {
        name: {
            "ms": 1000 * median(turn[name] for turn in turns),
            "ratio": median(turn[name] / turn[first] for turn in turns),
        }
        for name in functions
    }


def _seconds(function: Callable[[], Any], count: int = 1) -> float:
    """Mean time of `count` calls in seconds."""
    start = time.perf_counter()
    for _ in range(count):
        result = function()
    for value in tf.nest.flatten(result):
        np.asarray(value)  # Waits for an accelerator, which computes on after the call.
    return (time.perf_counter() - start) / count


def head(classes: Sequence[int], policies: Sequence[str], repeats: int) -> Rows:
    """Forward and backward pass of the head alone."""
    for policy, count, compiled in product(policies, classes, (False, True)):
        for names in (_TWO_PRODUCTS, _THREE_PRODUCTS):
            keras.config.set_dtype_policy(policy)
            steps = {name: training_step(name, count, compiled) for name in names}
            keras.config.set_dtype_policy("float32")
            yield {"what": f"T = {count}, {policy}{_xla(compiled)}", **paired(steps, repeats)}


def compilation(classes: Sequence[int] = (10, 1000), repeats: int = 3) -> Rows:
    """The first training step with XLA, tracing included, of the head alone and of LeNet."""

    def of_head(name, count):
        return training_step(name, count, compiled=True)()

    def of_lenet(name, count):
        features = networks.lenet((28, 28, 1), 0)
        x, y = np.zeros((100, 28, 28, 1), "float32"), np.zeros(100)
        return _model_step(features, *head_and_loss(name, count), x, y, jit_compile=True)()

    for (what, step), count in product({"the head": of_head, "LeNet": of_lenet}.items(), classes):
        steps = {name: partial(step, name, count) for name in ("Dense(2T)", "prior", "label")}
        yield {"what": f"first step of {what}, T = {count}, XLA", **paired(steps, repeats)}


def network(repeats: int) -> Rows:
    """Training steps of a Keras model. Keras decides whether XLA compiles them."""
    draw = np.random.default_rng(0)
    x, y = draw.random((50, 28, 28, 1), "float32"), draw.integers(10, size=50)
    steps = {}
    for name in ("Dense(T)", "prior", "label"):
        features = networks.tutorial_cnn((28, 28, 1), 0)
        steps[name] = _model_step(features, *head_and_loss(name, 10), x, y)
    yield {"what": "training step, batch 50, tutorial CNN", **paired(steps, repeats)}


def _model_step(features, head, loss, x, y, **options):
    model = keras.Sequential([features, head])
    model.compile("adam", loss, **options)
    return partial(model.train_on_batch, x, y)


def predict(repeats: int) -> Rows:
    """The test-time modes, alone and after a network."""
    draw = np.random.default_rng(0)
    features = networks.tutorial_cnn((28, 28, 1), 0)
    for count, compiled in product((10, 1000, 10_000), (False, True)):
        x = tf.Variable(draw.normal(size=(BATCH, FEATURES)).astype("float32"))
        dense = keras.layers.Dense(2 * count, "softmax")
        functions = {"Dense(2T), softmax": partial(tf.function(dense, jit_compile=compiled), x)}
        functions |= _modes([], count, x, compiled)
        what = f"head, batch {BATCH}, T = {count}{_xla(compiled)}"
        yield {"what": what, **paired(functions, repeats)}
    x = tf.Variable(draw.random((500, 28, 28, 1), "float32"))
    functions = _modes([features], 10, x)
    yield {"what": "tutorial CNN, batch 500, T = 10", **paired(functions, repeats)}


def _modes(layers, classes, x, compiled=False):
    """Functions that predict in every mode; with XLA in mode `"expected"` only."""
    functions = {}
    for mode, samples in _MODES[:1] if compiled else _MODES:
        head = DropMaxHead(classes, predict_mode=mode, predict_samples=samples)
        model = keras.Sequential([*layers, head])
        name = f"{mode}, S = {samples}" if mode == "sampled" else mode
        functions[name] = partial(tf.function(model, jit_compile=compiled), x)
    return functions


def memory(classes: Sequence[int], batch: int) -> Rows:
    """Peak memory and time of a training step, each in new processes; ratios of the memory.

    The order in which a graph happens to run changes the peak, so it is the median of three.
    """
    for count, compiled in product(classes, (False, True)):
        row = {}
        for name in ("Dense(2T)", "prior", "label"):
            runs = [peak(name, count, compiled, batch) for _ in range(3)]
            row[name] = {unit: median(run[unit] for run in runs) for unit in runs[0]}
            row[name]["ratio"] = row[name]["MiB"] / max(row["Dense(2T)"]["MiB"], 1)
        yield {"what": f"training step, batch {batch}, T = {count}{_xla(compiled)}", **row}


def peak(name: str, classes: int, compiled: bool = False, batch: int = BATCH) -> dict[str, float]:
    """`"MiB"` and `"ms"` of a `training_step` in a new process, without TensorFlow's own memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, name, classes, compiled, batch).result()


def _peak(name, classes, compiled, batch):
    training_step(name, 10, compiled=compiled)()  # Takes the memory that every head needs.
    before = _peak_so_far()
    step = training_step(name, classes, compiled=compiled, batch=batch)
    seconds = [_seconds(step) for _ in range(4)]
    return {"MiB": _peak_so_far() - before, "ms": 1000 * median(seconds[1:])}


def _peak_so_far():
    """In MiB, of the GPU, or of this process if there is no GPU."""
    if tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20
    # `resource.getrusage` would include the memory of the parent process before the fork.
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def _xla(compiled):
    return ", XLA" if compiled else ""
