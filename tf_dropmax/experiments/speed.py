"""What the head costs: times and memory as ratios to named baselines, all of them measured in turns, in one run."""

import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from matplotlib.figure import Figure
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from tf_dropmax import DropMaxHead, DropMaxLoss, functional
from tf_dropmax.experiments import networks, runner
from tf_dropmax.experiments.errors import UserError
from tf_dropmax.experiments.systems import PEERS, SYSTEMS

BATCH, FEATURES = 256, 512
PARTS = ("head", "network", "systems", "predict", "memory", "growth")


def run(parts=PARTS, classes=(10, 100, 1000, 10_000, 50_000), policies=None, repeats=9, output="dropmax-speed"):
    """Measures, prints tables, and writes the numbers, and a picture of how cost grows with the number of classes.

    Args:
        parts: Sequence of names in `PARTS`: `"head"`, forward and backward pass of the head alone; `"network"`, whole training
            steps; `"systems"`, those of every system that `table1` compares; `"predict"`, the test-time modes; `"memory"`, of
            a training step with the largest of `classes`; `"growth"`, with hundreds of thousands of classes. Defaults to all.
        classes: Sequence of positive ints, numbers of classes T. Defaults to `(10, 100, 1000, 10000, 50000)`.
        policies: Sequence of dtype policies for `"head"`, or `None`: float32 and, on a GPU, mixed_float16 and mixed_bfloat16;
            elsewhere, mixed_bfloat16. Defaults to `None`.
        repeats: Positive int, number of turns whose median is reported. Defaults to 9.
        output: Path of the folder for the results. Defaults to `"dropmax-speed"`.

    Returns:
        `{"environment": versions and device, part: [{"what": text, contender: {"ms" or "MiB": number, "ratio": number}}]}`,
        with the parts that the folder had before.

    Raises:
        UserError: if the folder cannot be written, or has measurements of another environment.
    """
    console = Console()
    if not console.is_terminal:
        console.width = 160
    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "speed.json").touch()
        results = json.loads((output / "speed.json").read_text() or "{}")
    except ValueError as error:
        raise UserError(f"{output / 'speed.json'} is not a result of this program ({error}).") from error
    except OSError as error:
        raise UserError(f"The output folder {output} cannot be written ({error.strerror or error}).") from error
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    policies = policies or ("float32", *(("mixed_float16", "mixed_bfloat16") if on_gpu else ("mixed_bfloat16",)))
    measure = {
        "head": partial(_head, classes, policies, repeats),
        "network": partial(_network, repeats),
        "systems": partial(_systems, repeats),
        "predict": partial(_predict, repeats),
        "memory": partial(_memory, max(classes)),
        "growth": _growth,
    }
    if results.setdefault("environment", runner.environment()) != runner.environment():
        raise UserError(f"{output} has measurements of another device or version: name another folder.")
    for part in parts:
        results[part] = []
        for row in measure[part]():
            console.print(_line(row))
            results[part].append(row)
            (output / "speed.json").write_text(json.dumps(results, indent=1))
        console.print(_table(part, results[part]))
    if "growth" in parts:
        _picture(results["growth"]).savefig(output / "growth.png", dpi=150)
    console.print(f"numbers: {output / 'speed.json'}", soft_wrap=True)
    return results


class NaiveHead(keras.layers.Layer):
    """The head as one would first write it: masks by `tfd.RelaxedBernoulli.sample`, log-sum-exps everywhere, autodiff."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.logits, self.retain = (keras.layers.Dense(units, dtype=self.dtype_policy) for _ in range(2))

    def build(self, input_shape):
        self.logits.build(input_shape)
        self.retain.build(input_shape)

    def call(self, inputs):
        logits, retain_logits = (tf.cast(branch(inputs), tf.float32) for branch in (self.logits, self.retain))
        masks = tf.clip_by_value(tfp.distributions.RelaxedBernoulli(0.1, logits=retain_logits).sample(), 1e-7, 1 - 1e-7)
        log_sum = tf.reduce_logsumexp(logits + tf.math.log(masks), axis=-1, keepdims=True)
        log_target = tf.reduce_logsumexp(tf.stack([log_sum + tf.zeros_like(logits), logits + tf.math.log(1 - masks)]), axis=0)
        rho = tf.sigmoid(retain_logits)
        entropy = -rho * tf.math.log_sigmoid(retain_logits) - (1 - rho) * tf.math.log_sigmoid(-retain_logits)
        self.add_loss(-tf.reduce_mean(tf.reduce_sum(entropy, axis=-1)))
        return tf.math.log_sigmoid(retain_logits) + logits - log_target - entropy


def _cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _heads(classes, policy):
    """Head and loss by name; the first is the baseline."""
    dense = partial(keras.layers.Dense, dtype=policy)
    head = partial(DropMaxHead, classes, dtype=policy)
    dropout = keras.Sequential([keras.layers.Dropout(0.5, dtype=policy), dense(classes)])
    return {
        "Dense(2T)": (dense(2 * classes), _cross_entropy()),
        "Dense(T)": (dense(classes), _cross_entropy()),
        "DropMax": (head(), DropMaxLoss()),
        "label": (head(posterior="label"), DropMaxLoss()),
        "attention": (head(stochastic=False), DropMaxLoss()),
        "random": (head(retain_probability=0.4), DropMaxLoss()),
        "naive": (NaiveHead(classes, dtype=policy), DropMaxLoss()),
        "MC dropout": (dropout, _cross_entropy()),
    }


def training_steps(classes, policy="float32", compiled=False, names=None):
    """Forward and backward pass of heads: functions of no argument, by name.

    Args:
        classes: Positive int, T.
        policy: Dtype policy. Defaults to `"float32"`.
        compiled: Bool, whether by XLA. Defaults to `False`.
        names: Sequence of the heads wanted, or `None`: all. Defaults to `None`.

    Returns:
        Dictionary of functions that return the loss and the gradients by the features and the weights.
    """
    draw = np.random.default_rng(0)
    x = tf.Variable(draw.normal(size=(BATCH, FEATURES)).astype("float32"))
    y = tf.Variable(draw.integers(classes, size=BATCH))
    heads = _heads(classes, policy)
    for name in names or heads:
        heads[name][0].build(x.shape)
    return {name: _step(*heads[name], x, y, compiled) for name in names or heads}


def _step(head, loss, x, y, compiled):
    @tf.function(jit_compile=compiled)
    def step():
        features = tf.identity(x)
        with tf.GradientTape() as tape:
            tape.watch(features)
            value = loss(y, head(features, training=True)) + sum(head.losses)
        return value, tape.gradient(value, [features, *head.trainable_variables])

    return step


def _head(classes, policies, repeats):
    for policy in policies:
        for count in classes:
            for compiled in (False, True):
                steps = training_steps(count, policy, compiled)
                yield {"what": f"T = {count}, {policy}{', XLA' if compiled else ''}", **paired(steps, repeats)}


def _network(repeats):
    """Training steps of Keras models, compiled by XLA or not as Keras picks it."""
    draw = np.random.default_rng(0)
    for name, network, shape in (
        ("tutorial CNN, 28 x 28", networks.tutorial_cnn, (28, 28, 1)),
        ("ResNet-34, 32 x 32", networks.resnet34, (32, 32, 3)),
    ):
        x, y = draw.random((50, *shape), "float32"), draw.integers(10, size=50)
        steps = {}
        for contender, head, loss in (
            ("Dense softmax", keras.layers.Dense(10), _cross_entropy()),
            ("DropMax", DropMaxHead(10), DropMaxLoss()),
            ("label", DropMaxHead(10, posterior="label"), DropMaxLoss()),
        ):
            steps[contender] = _training_step(network(shape, 0), head, loss, x, y)
        yield {"what": f"training step, batch 50, {name}", **paired(steps, repeats)}


def _training_step(features, head, loss, x, y):
    model = keras.Sequential([features, head])
    model.compile("adam", loss)
    return partial(model.train_on_batch, x, y)


def _systems(repeats, network=networks.lenet, systems=SYSTEMS | PEERS):
    """As `_network`, of the systems with their default settings; a row for each, as there are many."""
    draw = np.random.default_rng(0)
    for classes in (10, 242):
        x, y = draw.random((100, 28, 28, 1), "float32"), draw.integers(classes, size=100)
        steps = {}
        for name, system in systems.items():
            head, loss = system.build(classes, 0, 0.0, **system.options_for(classes)[0])
            steps[name] = _training_step(network((28, 28, 1), 0, 0.0), head, loss, x, y)
        measured = paired(steps, repeats)
        for name in list(steps)[1:]:
            yield {"what": f"training step, T = {classes}: {name}", "base": measured["base"], "system": measured[name]}


def _predict(repeats):
    draw = np.random.default_rng(0)
    for count in (10, 1000, 10_000):
        x = tf.Variable(draw.normal(size=(BATCH, FEATURES)).astype("float32"))
        functions = {"Dense(2T) + softmax": _forward(keras.layers.Dense(2 * count, "softmax"), x)}
        for name, mode, samples in _MODES:
            functions[name] = _forward(DropMaxHead(count, predict_mode=mode, predict_samples=samples), x)
        yield {"what": f"head, batch {BATCH}, T = {count}", **paired(functions, repeats)}
        functions = {
            "Dense(2T) + softmax": _forward(keras.layers.Dense(2 * count, "softmax"), x, compiled=True),
            "expected": _forward(DropMaxHead(count), x, compiled=True),
        }
        yield {"what": f"head, batch {BATCH}, T = {count}, XLA", **paired(functions, repeats)}
    x = tf.Variable(draw.random((500, 28, 28, 1), "float32"))
    network, functions = networks.tutorial_cnn((28, 28, 1), 0), {}
    for name, mode, samples in _MODES:
        head = DropMaxHead(10, predict_mode=mode, predict_samples=samples)
        functions[name] = _forward(keras.Sequential([network, head]), x)
    yield {"what": "tutorial CNN, batch 500, T = 10", **paired(functions, repeats)}
    # How far off are the estimates? Against the quadrature in float64, which is good to 1e-12.
    logits, retain_logits = 3 * draw.normal(size=(2, BATCH, 1000))
    reference = np.exp(functional.exact(logits, retain_logits))
    small = logits.astype("float32"), retain_logits.astype("float32")
    for name, log_p in (
        ("exact", functional.exact(*small)),
        ("sampled, S = 30", functional.sampled(*small, samples=30)),
        ("sampled, S = 100", functional.sampled(*small, samples=100)),
    ):
        yield {
            "what": f"largest error of a probability, T = 1000: {name}",
            "error": float(np.abs(np.exp(log_p) - reference).max()),
        }


_MODES = (
    ("expected", "expected", 1),
    ("sampled, S = 30", "sampled", 30),
    ("sampled, S = 100", "sampled", 100),
    ("exact", "exact", 1),
)


def _forward(layer, x, compiled=False):
    return partial(tf.function(layer, jit_compile=compiled), x)


def _memory(classes, names=("Dense(2T)", "DropMax", "label", "naive")):
    """Peak memory of a training step, each in a process of its own, less what the process had before."""
    for compiled in (False, True):
        row = {"what": f"peak memory of a training step, T = {classes}{', XLA' if compiled else ''}"}
        for name in names:
            row[name] = {"MiB": _peak(classes, name, compiled)[0]}
            row[name]["ratio"] = row[name]["MiB"] / max(row[names[0]]["MiB"], 1)
        yield row


def _growth(counts=(50_000, 100_000, 200_000, 300_000)):
    """Time and peak memory with very many classes, batch 256."""
    for classes in counts:
        row = {"what": f"T = {classes}", "classes": classes}
        for name in ("Dense(2T)", "DropMax"):
            memory, seconds = _peak(classes, name)
            row[name] = {"MiB": memory, "ms": 1000 * seconds}
        row["DropMax"]["ratio"] = row["DropMax"]["ms"] / row["Dense(2T)"]["ms"]
        yield row


def _peak(classes, name, compiled=False):
    """Peak memory in MiB, and seconds of a step, of a head in a new process."""
    code = f"from tf_dropmax.experiments import speed; speed.print_peak({classes}, {name!r}, {compiled})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"The measurement of {name} with {classes} classes failed: {result.stderr[-500:]}")
    memory, seconds = json.loads(result.stdout.splitlines()[-1])
    return memory, seconds


def print_peak(classes, name, compiled):
    """For `_peak`: runs a training step four times."""
    small = training_steps(10, compiled=compiled, names=[name])[name]
    small()  # what TensorFlow needs in any case is not the head's
    before = _peak_so_far()
    step = training_steps(classes, compiled=compiled, names=[name])[name]
    seconds = [_call(step, 1) for _ in range(4)]
    print(json.dumps([_peak_so_far() - before, statistics.median(seconds[1:])]))


def _peak_so_far():
    """In MiB, of the GPU or else of this process (`getrusage` would give what the process that started it had)."""
    if tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))


def paired(functions, repeats=15, least=0.05):
    """Times functions of no argument in turns.

    Args:
        functions: Dictionary of functions; the first is the baseline.
        repeats: Positive int, number of turns. Defaults to 15.
        least: Positive float, seconds that a turn of a function lasts at least, by calling it often enough. Defaults to 0.05.

    Returns:
        `{name: {"ms": median milliseconds of a call, "ratio": median of the ratios to the baseline of the same turn}}`.
    """
    calls = {}
    for name, function in functions.items():
        _call(function, 1)  # traces
        calls[name] = max(1, round(least / _call(function, 1)))
    turns = [{name: _call(function, calls[name]) for name, function in functions.items()} for _ in range(repeats)]
    baseline = next(iter(functions))
    return {
        name: {
            "ms": 1000 * statistics.median(turn[name] for turn in turns),
            "ratio": statistics.median(turn[name] / turn[baseline] for turn in turns),
        }
        for name in functions
    }


def _call(function, count):
    """Seconds of a call, by the mean of `count`."""
    start = time.perf_counter()
    for _ in range(count):
        result = function()
    for value in tf.nest.flatten(result):
        np.asarray(value)  # an accelerator computes on after the call
    return (time.perf_counter() - start) / count


def _line(row):
    cells = []
    for name, value in row.items():
        if isinstance(value, dict):
            cells.append(f"{name} " + " ".join(f"{number:.3g} {unit}" for unit, number in value.items()))
    return f"{row['what']}: " + (", ".join(cells) or f"{row['error']:.1e}")


def _table(part, rows):
    contenders = list(dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, dict)))
    table = Table(title=f"{part}: ratios to the first", box=MARKDOWN)
    for name in ("", *contenders):
        table.add_column(name)
    for row in rows:
        if "error" in row:
            continue
        table.add_row(row["what"], *(_cell(row.get(name)) for name in contenders))
    return table


def _cell(value):
    if value is None:
        return ""
    ratio = f"{value['ratio']:.2f} " if "ratio" in value else ""
    return ratio + "(" + ", ".join(f"{number:.3g} {unit}" for unit, number in value.items() if unit != "ratio") + ")"


def _picture(rows):
    """Time and memory against the number of classes."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = (("ms", "time of a training step", 1000, "seconds"), ("MiB", "peak memory", 1024, "GiB"))
    for axes, (key, title, factor, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, style in (("Dense(2T)", "k--o"), ("DropMax", "k-s")):
            x, y = [row["classes"] / 1000 for row in rows], [row[name][key] / factor for row in rows]
            axes.plot(x, y, style, label=name, markersize=5)
        axes.set(xlabel="number of classes T, in thousands", ylabel=unit, title=title, xlim=(0, None), ylim=(0, None))
        axes.legend(frameon=False)
    return figure
