"""One training run of one system, from a job to its measures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax.experiments import data, networks
from tf_dropmax.experiments.checkpoint import Checkpoint
from tf_dropmax.experiments.measures import (
    calibrated_measures,
    fitted_temperature,
    measures_of,
    out_of_scope_auroc,
)
from tf_dropmax.experiments.runner import Job
from tf_dropmax.experiments.systems import ALL


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


# The iterations are 200 epochs of the 1,000 and 5,000 images of MNIST, 1,000 epochs of the 200
# fours and nines, and 60 epochs of Omniglot.
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
    "cifar-10-5k": Column("cifar10_jpeg", 10, 500, 500, 5000, 4000),
    "digits": Column("digits", 10, 30, 30, 300, 600),
    "banking77-5": Column("banking77", 77, 5, 5, 2000, 1000),
    "banking77-10": Column("banking77", 77, 10, 10, 2000, 1000),
    "banking77": Column("banking77", 77, None, None, 2000, 3000),
    "clinc150-5": Column("clinc150", 150, 5, 5, 3000, 1000),
    "clinc150-10": Column("clinc150", 150, 10, 10, 3000, 1000),
    "clinc150": Column("clinc150", 150, None, None, 3000, 3000),
}
_lenet_he = partial(networks.lenet, start=keras.initializers.HeNormal)
_hidden = partial(networks.mlp, width=512, start=keras.initializers.GlorotUniform)
# The schedules of the residual networks (for CIFAR) and "alexnet" (for AwA2) are not the authors'.
# "linear" and "hidden" are for embeddings.
PROTOCOLS = {
    "paper": Protocol(networks.tutorial_cnn, 50, 1e-4, False, 20_000),
    "released": Protocol(networks.lenet, 100, 1e-3, True, None),
    "released-he": Protocol(_lenet_he, 100, 1e-3, True, None),
    "resnet": Protocol(networks.resnet34, 128, 1e-3, True, None),
    "alexnet": Protocol(networks.alexnet, 128, 1e-4, True, None),
    "small-resnet": Protocol(networks.resnet14, 128, 1e-3, True, None),
    "small": Protocol(networks.mlp, 50, 1e-3, True, None),
    "linear": Protocol(networks.identity, 100, 1e-3, True, None, learns_features=False),
    "hidden": Protocol(_hidden, 100, 1e-3, True, None),
}
_CURVE_POINTS = 24  # Their steps form a geometric series.


def execute(job: Job, folder: Path | str | None = None) -> dict[str, Any]:
    """Trains and measures.

    A resumed run gives the same result as one without interruption, with two exceptions. Dropout
    and the sampled softmax restart their streams of random numbers. The sampled softmax also
    restarts its counts.

    Args:
        job: `{"column", "protocol", "iterations", "method", "settings", "seed", "phase"}`. Phase
            `"search"` measures on validation data and does not use the test data. Phase `"final"`
            measures on test data. Phase `"curve"` is the same and also measures during training.
            The settings contain `"l2"`, the weight decay, and may contain `"feature_decay"`, the
            weight of an L2 penalty of the features (`keras.layers.ActivityRegularization`). The
            optional `"temperatures"`, `{row: temperature}`, are those of the calibrated measures.
            The optional `"weights"` is the path of a `.weights.h5` file from which the network
            without its head starts. Otherwise it starts from random weights.
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
    rows = system.rows
    first_row = next(iter(rows))

    def measure():
        parts = {"train": split.train, "test": split.test}
        return {name: measures_of(rows[first_row](model, x), y) for name, (x, y) in parts.items()}

    measure_after = set()
    if job["phase"] == "curve":
        measure_after = {round(epoch) for epoch in np.geomspace(1, epochs, _CURVE_POINTS)}
    checkpoint = Checkpoint(folder, job, measure_after, measure)
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
    seconds = checkpoint.seconds()
    x, y = split.validation if job["phase"] == "search" else split.test
    predictions = {row: predict(model, x) for row, predict in rows.items()}
    measures = {row: measures_of(log_p, y) for row, log_p in predictions.items()}
    result: dict[str, Any] = {"measures": measures, "loss": checkpoint.losses}
    if job["phase"] == "search":
        result["temperatures"] = {
            row: fitted_temperature(log_p, y) for row, log_p in predictions.items()
        }
    for row, temperature in job.get("temperatures", {}).items():
        measures[row] |= calibrated_measures(predictions[row], y, temperature)
    if job["phase"] != "search" and dataset.x_out_of_scope is not None:
        for row, measured in _out_of_scope(system, model, x, dataset.x_out_of_scope).items():
            measures[row] |= measured
    if job["phase"] == "curve":
        result["curve"] = checkpoint.curve
    checkpoint.remove()
    return {**result, "seconds": seconds, "steps": steps * epochs}


def _out_of_scope(system, model, known, unknown):
    """`{row: {measure: number}}`. The logits are the same for every way to predict."""

    def auroc(score):
        return out_of_scope_auroc(score(known), score(unknown))

    def certainty(predict, x):
        log_p = predict(model, x)
        return np.sum(np.exp(log_p) * log_p, axis=-1)

    by_logit = auroc(lambda x: system.logits(model, x).max(axis=-1))
    return {
        row: {"AUROC %, logit": by_logit, "AUROC %, entropy": auroc(partial(certainty, predict))}
        for row, predict in system.rows.items()
    }


def _compiled_model(job: Job, dataset: data.Dataset) -> keras.Model:
    protocol = PROTOCOLS[job["protocol"]]
    settings = dict(job["settings"])
    l2, feature_decay = settings.pop("l2"), settings.pop("feature_decay", 0.0)
    features = protocol.network(dataset.x.shape[1:], job["seed"], l2)
    if "weights" in job:
        features.load_weights(job["weights"])
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
