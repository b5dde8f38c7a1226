"""One training run of one system: from a job to its measures."""

import hashlib
import json
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax.experiments import data, networks
from tf_dropmax.experiments.measures import MEASURES
from tf_dropmax.experiments.runner import key
from tf_dropmax.experiments.systems import ALL


class Column(NamedTuple):
    """Data of one column of the table. While settings are searched, `search_per_class` images a class train."""

    dataset: str
    classes: int
    train_per_class: int | None
    search_per_class: int | None
    validation: int
    iterations: int  # of the released protocol


class Protocol(NamedTuple):
    network: callable
    batch: int
    learning_rate: float
    decays: bool  # divide the learning rate by 10 at 1/3 and 2/3 of the iterations
    iterations: int | None  # None: as the column says


# Iterations of "released": 200 epochs of the 1,000 and 5,000 images, 1,000 of the 200 fours and nines, 60 of Omniglot.
COLUMNS = {
    "mnist-1k": Column("mnist", 10, 100, 100, 5000, 2000),
    "mnist-5k": Column("mnist", 10, 500, 500, 5000, 10_000),
    "mnist-55k": Column("mnist", 10, None, None, 5000, 20_000),
    "omniglot-242": Column("omniglot242", 242, 15, 12, 726, 2220),
    "mnist-4-9": Column("mnist49", 2, 100, 100, 2000, 2000),
    "omniglot-968": Column("omniglot968", 968, 15, 12, 2904, 8760),
    "cifar-10": Column("cifar10", 10, None, None, 5000, 64_000),
    "cifar-100": Column("cifar100", 100, None, None, 5000, 64_000),
    "awa2": Column("awa2", 50, None, None, 5000, 20_000),
    "digits": Column("digits", 10, 30, 30, 300, 600),
}
PROTOCOLS = {
    "paper": Protocol(networks.tutorial_cnn, 50, 1e-4, False, 20_000),
    "released": Protocol(networks.lenet, 100, 1e-3, True, None),
    "released-he": Protocol(partial(networks.lenet, start=keras.initializers.HeNormal), 100, 1e-3, True, None),
    "resnet": Protocol(networks.resnet34, 128, 1e-3, True, None),  # for CIFAR; the schedule is ours
    "alexnet": Protocol(networks.alexnet, 128, 1e-4, True, None),  # for AwA2; the schedule is ours
    "small": Protocol(networks.mlp, 50, 1e-3, True, None),
}


_CURVE_POINTS = 24  # by steps that grow by the same factor


def execute(job, folder=None):
    """Trains and measures.

    Args:
        job: `{"column", "protocol", "iterations", "method", "settings", "seed", "phase"}` and, if the network does not start
            from random weights, `"weights"`, the path of a `.weights.h5` file of it without its head. Phase `"search"`
            measures on validation data, and the test data are not touched; phase `"final"` measures on test data; phase
            `"curve"` is the same and measures in the course of training too.
        folder: Path for checkpoints, from which a killed run goes on, or `None`. Defaults to `None`.

    Returns:
        `{"measures": {row: {measure: number}}, "loss": [training loss of every epoch], "seconds", "steps"}`; `seconds` of
        training; and, in a search, `"fitted"`, settings that the system fits to validation data. In phase `"curve"` also
        `"curve": [{"step", "train": {measure: number}, "test": {measure: number}}]`, by the first row.

        A run that was resumed gives the same as one that was not, except that dropout and the sampled softmax begin anew with
        their random numbers, and the latter with its counts.
    """
    keras.backend.clear_session()  # a worker runs many jobs, and would keep the graphs of all
    protocol, system, seed = PROTOCOLS[job["protocol"]], ALL[job["method"]], job["seed"]
    dataset, split = split_for(job)
    settings = dict(job["settings"])
    l2 = settings.pop("l2")
    features = protocol.network(dataset.x.shape[1:], seed, l2)
    if "weights" in job:
        features.load_weights(job["weights"])
    head, loss = system.build(dataset.classes, seed, l2, **settings)
    model = keras.Sequential([features, head])
    model.compile(keras.optimizers.Adam(_learning_rate(protocol, job["iterations"])), loss)
    steps = -(-len(split.train[1]) // protocol.batch)
    checkpoint = _Checkpoint(folder, job)
    first = checkpoint.restore(model)
    checkpoint.started = time.monotonic()
    epochs = -(-job["iterations"] // steps)
    rows = list(system.rows.items())
    if job["phase"] == "curve":
        checkpoint.measure_after = {round(epoch) for epoch in np.geomspace(1, epochs, _CURVE_POINTS)}
        checkpoint.measure = lambda: {
            name: _measure(rows[0][1](model, x), y) for name, (x, y) in {"train": split.train, "test": split.test}.items()
        }
    model.fit(
        _batches(split.train, protocol.batch, seed, range(first, epochs)),
        steps_per_epoch=steps,
        initial_epoch=first,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[checkpoint],
    )
    seconds = checkpoint.seconds()
    x, y = split.validation if job["phase"] == "search" else split.test
    predictions = {row: predict(model, x) for row, predict in rows}
    result = {"measures": {row: _measure(log_p, y) for row, log_p in predictions.items()}, "loss": checkpoint.losses}
    if job["phase"] == "search" and system.fit:
        result["fitted"] = system.fit(predictions[rows[0][0]], y)
    if job["phase"] == "curve":
        result["curve"] = checkpoint.curve
    checkpoint.remove()
    return {**result, "seconds": seconds, "steps": steps * epochs}


def _measure(log_probabilities, labels):
    return {name: measure(log_probabilities, labels) for name, measure in MEASURES.items()}


def split_for(job):
    """The data set of a job and its split. Images that test are never among those that a search sees."""
    column, search = COLUMNS[job["column"]], job["phase"] == "search"
    dataset = data.LOADERS[column.dataset]()
    if dataset.x_test is None:
        dataset = data.hold_out(dataset, 50)
    per_class = column.search_per_class if search else column.train_per_class
    held_out = column.validation if search or per_class == column.search_per_class else 0
    return dataset, data.split(dataset, per_class, held_out, job["seed"])


def _learning_rate(protocol, iterations):
    if not protocol.decays:
        return protocol.learning_rate
    rates = [protocol.learning_rate / 10**power for power in range(3)]
    return keras.optimizers.schedules.PiecewiseConstantDecay([iterations // 3, 2 * iterations // 3], rates)


def _batches(train, batch, seed, epochs):
    """Every epoch in an order of its own, which depends on the seed and the epoch alone, so that a run can be resumed."""
    x, y = (tf.constant(part) for part in train)

    def epoch(number):
        order = tf.random.experimental.stateless_shuffle(tf.range(len(y)), tf.stack([tf.constant(seed, tf.int64), number]))
        return tf.data.Dataset.from_tensor_slices(order).batch(batch)

    order = tf.data.Dataset.range(epochs.start, epochs.stop).flat_map(epoch)
    return order.map(lambda index: (tf.gather(x, index), tf.gather(y, index))).prefetch(2)


class _Checkpoint(keras.callbacks.Callback):
    """Between epochs, at most every 20 seconds, saves weights, optimizer and records; a kill leaves the last save whole.

    Records the training loss of every epoch and, after the epochs in `measure_after`, what `measure` gives.
    """

    def __init__(self, folder, job):
        super().__init__()
        self.folder = folder and Path(folder)
        self.name = hashlib.sha256(key(job).encode()).hexdigest()[:16]
        self.losses, self.curve = [], []
        self.measure_after, self.measure = set(), None
        self.earlier = 0.0  # seconds of training before the last resumption
        self.started = self.saved = time.monotonic()

    def seconds(self):
        return self.earlier + time.monotonic() - self.started

    def restore(self, model):
        """Loads the last save, if there is one; returns the number of epochs that it had seen."""
        epoch = max((int(path.name.split("-")[1].split(".")[0]) for path in self._files("weights.h5")), default=0)
        if epoch:
            model.optimizer.build(model.trainable_variables)
            model.load_weights(self.folder / f"{self.name}-{epoch}.weights.h5")
            state = json.loads((self.folder / f"{self.name}-{epoch}.json").read_text())
            self.losses, self.curve, self.earlier = state["loss"], state["curve"], state["seconds"]
        return epoch

    def on_epoch_end(self, epoch, logs=None):
        self.losses.append(float(logs["loss"]))
        if epoch + 1 in self.measure_after:
            self.curve.append({"step": int(self.model.optimizer.iterations), **self.measure()})
        if self.folder and time.monotonic() - self.saved > 20:
            self.folder.mkdir(parents=True, exist_ok=True)
            old = self._files("*")
            stem = f"{self.name}-{len(self.losses)}"
            state = {"loss": self.losses, "curve": self.curve, "seconds": self.seconds()}
            (self.folder / f"{stem}.json").write_text(json.dumps(state))
            temporary = self.folder / f"{self.name}.weights.h5"
            self.model.save_weights(temporary, overwrite=True)
            temporary.replace(self.folder / f"{stem}.weights.h5")
            for path in old:
                path.unlink()
            self.saved = time.monotonic()

    def remove(self):
        for path in self._files("*"):
            path.unlink()

    def _files(self, kind):
        return list(self.folder.glob(f"{self.name}-*.{kind}")) if self.folder else []
