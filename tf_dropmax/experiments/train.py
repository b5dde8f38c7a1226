"""One training run of one system, from a job to its measures."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax.experiments import data, networks
from tf_dropmax.experiments.measures import (
    calibrated_measures,
    fitted_temperature,
    measures_of,
    out_of_scope_auroc,
)
from tf_dropmax.experiments.runner import Job, key
from tf_dropmax.experiments.systems import ALL, logits


class Column(NamedTuple):
    """The data of a column of the table.

    Attributes:
        dataset: A key of `data.LOADERS`.
        classes: The number of classes.
        train_per_class: Training examples of each class in a final run. `None` takes all.
        search_per_class: The same while settings are searched.
        validation: Validation examples.
        iterations: Training steps of the protocol `"released"`.
    """

    dataset: str
    classes: int
    train_per_class: int | None
    search_per_class: int | None
    validation: int
    iterations: int


class Protocol(NamedTuple):
    """How a network is trained.

    Attributes:
        network: Function `network(shape, seed, l2)`; see `networks`.
        batch: Examples in a batch.
        learning_rate: The initial learning rate of Adam.
        decays: Whether it is divided by 10 after 1/3 and after 2/3 of the iterations.
        iterations: Training steps. `None` takes those of the column.
        learns_features: Whether the network has weights. Otherwise an L2 penalty of the features
            changes nothing.
    """

    network: Callable[..., keras.Model]
    batch: int
    learning_rate: float
    decays: bool
    iterations: int | None
    learns_features: bool = True


# The iterations are 200 epochs of the 1,000 and 5,000 images of MNIST, and 60 epochs of Omniglot.
COLUMNS = {
    "mnist-1k": Column("mnist", 10, 100, 100, 5000, 2000),
    "mnist-5k": Column("mnist", 10, 500, 500, 5000, 10_000),
    "mnist-55k": Column("mnist", 10, None, None, 5000, 20_000),
    "omniglot-242": Column("omniglot242", 242, 15, 12, 726, 2220),
    "omniglot-968": Column("omniglot968", 968, 15, 12, 2904, 8760),
    "cifar-10": Column("cifar10", 10, None, None, 5000, 64_000),
    "cifar-100": Column("cifar100", 100, None, None, 5000, 64_000),
    "cifar-10-5k": Column("cifar10_jpeg", 10, 500, 500, 5000, 1000),
    "digits": Column("digits", 10, 30, 30, 300, 600),
    "banking77-5": Column("banking77", 77, 5, 5, 2000, 1000),
    "banking77-10": Column("banking77", 77, 10, 10, 2000, 1000),
    "banking77": Column("banking77", 77, None, None, 2000, 3000),
    "clinc150-5": Column("clinc150", 150, 5, 5, 3000, 1000),
    "clinc150-10": Column("clinc150", 150, 10, 10, 3000, 1000),
    "clinc150": Column("clinc150", 150, None, None, 3000, 3000),
}
_hidden = partial(networks.mlp, width=512, start=keras.initializers.GlorotUniform)
# The schedules of the residual networks (for CIFAR) are not the authors'.
# "cnn" is a network as in tutorials. "linear" and "hidden" are for embeddings.
PROTOCOLS = {
    "paper": Protocol(networks.tutorial_cnn, 50, 1e-4, False, 20_000),
    "released": Protocol(networks.lenet, 100, 1e-3, True, None),
    "released-dropout": Protocol(partial(networks.lenet, dropout=0.5), 100, 1e-3, True, None),
    "cnn": Protocol(networks.cnn, 32, 1e-3, False, None),
    "resnet": Protocol(networks.resnet34, 128, 1e-3, True, None),
    "small-resnet": Protocol(networks.resnet14, 128, 1e-3, True, None),
    "small": Protocol(networks.mlp, 50, 1e-3, True, None),
    "linear": Protocol(networks.identity, 100, 1e-3, True, None, learns_features=False),
    "hidden": Protocol(_hidden, 100, 1e-3, True, None),
}
_CURVE_POINTS = 24  # Their steps form a geometric series.


class Checkpoint(keras.callbacks.Callback):
    """Records the course of a training run, and saves it between epochs, at most every 20 seconds.

    A kill at any moment leaves the last complete save.

    Args:
        path: Path of the file for the saves. `None` saves nothing.
        measure_after: The numbers of the epochs, from 1, after which `measure` is called.
        measure: Function without arguments that returns a dictionary of JSON values.

    Attributes:
        state: Dictionary of `"loss"`, the training loss of every epoch; `"seconds"` of training;
            and `"curve"`, if anything was measured, the results of `measure` with their `"step"`.
    """

    def __init__(
        self,
        path: Path | None,
        measure_after: Collection[int],
        measure: Callable[[], dict[str, Any]],
    ):
        super().__init__()
        self.path, self.measure_after, self.measure = path, measure_after, measure
        self.state: dict[str, Any] = {"loss": [], "seconds": 0.0}
        self.started = self.saved = time.monotonic()

    def restore(self, model: keras.Model) -> int:
        """Loads the last save, if there is one, and returns the number of its epochs."""
        model.optimizer.build(model.trainable_variables)
        if self.path and self.path.exists():
            with np.load(self.path) as file:
                self.state = json.loads(str(file["state"]))
                for number, variable in enumerate(_variables(model)):
                    variable.assign(file[f"arr_{number}"])
        return len(self.state["loss"])

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.started = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.state["seconds"] += time.monotonic() - self.started
        self.state["loss"].append(float(logs["loss"]))
        if epoch + 1 in self.measure_after:
            step = int(self.model.optimizer.iterations)
            self.state.setdefault("curve", []).append({"step": step, **self.measure()})
        if self.path and time.monotonic() - self.saved > 20:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            arrays = [variable.numpy() for variable in _variables(self.model)]
            temporary = self.path.with_suffix(".part")
            with temporary.open("wb") as file:
                np.savez(file, *arrays, state=np.array(json.dumps(self.state)))
            temporary.replace(self.path)
            self.saved = time.monotonic()


def _variables(model):
    """The weights, the states of random numbers, and the state of the optimizer."""
    return [*model.variables, *model.optimizer.variables]


def execute(job: Job, folder: Path | str | None = None) -> dict[str, Any]:
    """Trains and measures.

    A resumed run gives the same result as one without interruption, with one exception. The sampled
    softmax restarts its stream of random numbers and its counts.

    Args:
        job: `{"column", "protocol", "iterations", "method", "settings", "seed", "phase"}`. Phase
            `"search"` measures on validation data and does not use the test data. Phase `"final"`
            measures on test data. Phase `"curve"` is the same and also measures during training.
            The settings contain `"l2"`, the weight decay, and may contain `"feature_decay"`, the
            weight of an L2 penalty of the features (`keras.layers.ActivityRegularization`). The
            optional `"temperatures"`, `{row: temperature}`, are those of the calibrated measures.
        folder: Path of the folder for checkpoints, from which a killed run continues, or `None`.
            Defaults to `None`.

    Returns:
        `{"measures": {row: {measure: number}}, "loss": [training loss of every epoch], "seconds",
        "steps"}`. `"seconds"` is the time of the training, `"steps"` the number of its steps. A
        search adds `"temperatures"`, fitted to the validation data. Phase `"curve"` adds
        `"curve": [{"step", "train": {measure: number}, "test": {measure: number}}]`, the
        measures of the first row. If the data set has examples of no class, a final run also
        measures how well the largest logit and the entropy tell them apart.
    """
    keras.backend.clear_session()  # Otherwise a worker keeps the graphs of all its jobs.
    protocol, system, seed = PROTOCOLS[job["protocol"]], ALL[job["method"]], job["seed"]
    dataset, split = split_for(job)
    model = _compiled_model(job, dataset)
    steps = -(-len(split.train[1]) // protocol.batch)
    epochs = -(-job["iterations"] // steps)
    first_row = next(iter(system.rows.values()))

    def measure():
        parts = {"train": split.train, "test": split.test}
        return {name: measures_of(first_row(model, x), y) for name, (x, y) in parts.items()}

    measure_after = set()
    if job["phase"] == "curve":
        measure_after = {round(epoch) for epoch in np.geomspace(1, epochs, _CURVE_POINTS)}
    name = hashlib.sha256(key(job).encode()).hexdigest()[:16]
    path = None if folder is None else Path(folder) / f"{name}.npz"
    checkpoint = Checkpoint(path, measure_after, measure)
    first = checkpoint.restore(model)
    model.fit(
        _batches(split.train, protocol.batch, seed, range(first, epochs)),
        steps_per_epoch=steps,
        initial_epoch=first,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[checkpoint],
    )
    result = {**checkpoint.state, "steps": steps * epochs}
    x, y = split.validation if job["phase"] == "search" else split.test
    predictions = {row: predict(model, x) for row, predict in system.rows.items()}
    measures = {row: measures_of(log_p, y) for row, log_p in predictions.items()}
    if job["phase"] == "search":
        result["temperatures"] = {
            row: fitted_temperature(log_p, y) for row, log_p in predictions.items()
        }
    elif dataset.x_out_of_scope is not None:
        for row, measured in _out_of_scope(system, model, x, dataset.x_out_of_scope).items():
            measures[row] |= measured
    for row, temperature in job.get("temperatures", {}).items():
        measures[row] |= calibrated_measures(predictions[row], y, temperature)
    if path:
        path.unlink(missing_ok=True)
    return {"measures": measures, **result}


def _out_of_scope(system, model, *parts):
    """`{row: {measure: number}}`. The logits are the same for every way to predict."""
    by_logit = out_of_scope_auroc(*(logits(model, x).max(axis=-1) for x in parts))
    found = {}
    for row, predict in system.rows.items():
        log_ps = [predict(model, x) for x in parts]
        by_entropy = out_of_scope_auroc(*(np.sum(np.exp(log_p) * log_p, -1) for log_p in log_ps))
        found[row] = {"AUROC %, logit": by_logit, "AUROC %, entropy": by_entropy}
    return found


def _compiled_model(job: Job, dataset: data.Dataset) -> keras.Model:
    protocol = PROTOCOLS[job["protocol"]]
    settings = dict(job["settings"])
    l2, feature_decay = settings.pop("l2"), settings.pop("feature_decay", 0.0)
    features = protocol.network(dataset.x.shape[1:], job["seed"], l2)
    if feature_decay:
        penalty = keras.layers.ActivityRegularization(l2=feature_decay)
        features = keras.Sequential([features, penalty])
    head, loss = ALL[job["method"]].build(dataset.classes, job["seed"], l2, **settings)
    model = keras.Sequential([features, head])
    model.compile(keras.optimizers.Adam(_learning_rate(protocol, job["iterations"])), loss)
    return model


def split_for(job: Job) -> tuple[data.Dataset, data.Split]:
    """The data set of a job and its split.

    A search neither trains nor validates on an example that tests in a final run.
    """
    column, search = COLUMNS[job["column"]], job["phase"] == "search"
    dataset = _loaded(data.LOADERS[column.dataset])
    if dataset.x_test is None:
        dataset = data.hold_out(dataset, 50)
    per_class = column.search_per_class if search else column.train_per_class
    held_out = column.validation if search or per_class == column.search_per_class else 0
    return dataset, data.split(dataset, per_class, held_out, job["seed"])


@functools.lru_cache(maxsize=1)
def _loaded(loader: Callable[[], data.Dataset]) -> data.Dataset:
    """The data set, which a worker keeps for its next job."""
    return loader()


def _learning_rate(protocol, iterations):
    if not protocol.decays:
        return protocol.learning_rate
    rates = [protocol.learning_rate / 10**power for power in range(3)]
    boundaries = [iterations // 3, 2 * iterations // 3]
    return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, rates)


def _batches(train: data.Part, batch: int, seed: int, epochs: range) -> tf.data.Dataset:
    """The batches of some epochs. The order of an epoch depends on `seed` and its number only."""
    x, y = (tf.constant(part) for part in train)

    def epoch(number):
        order_seed = tf.stack([tf.constant(seed, tf.int64), number])
        order = tf.random.experimental.stateless_shuffle(tf.range(len(y)), order_seed)
        return tf.data.Dataset.from_tensor_slices(order).batch(batch)

    order = tf.data.Dataset.range(epochs.start, epochs.stop).flat_map(epoch)
    return order.map(lambda index: (tf.gather(x, index), tf.gather(y, index))).prefetch(2)
