"""The demo: the same small network with a plain softmax and with DropMax, measured side by side."""

import json
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tf_dropmax import DropMaxHead, DropMaxLoss, DropMaxPredict, plots
from tf_dropmax.experiments import data, networks
from tf_dropmax.experiments.errors import UserError
from tf_dropmax.experiments.measures import MEASURES
from tf_dropmax.head import PREDICT_MODES

TRAIN_PER_CLASS = {"digits": 30, "mnist": 100}
BATCH = 50


def run(dataset="digits", seeds=5, epochs=200, output="dropmax-demo"):
    """Trains, measures, prints a table, and saves a model, a picture and the numbers.

    Args:
        dataset: `"digits"` or `"mnist"`. Defaults to `"digits"`.
        seeds: Positive int, number of runs of either network. Run i has split, initial weights, order of batches and masks
            from seed i. Defaults to 5.
        epochs: Positive int. Defaults to 200, as in the authors' released code.
        output: Path of the folder for the results. Defaults to `"dropmax-demo"`.

    Returns:
        `{row: {measure: [a number for each seed]}}`.

    Raises:
        UserError: if the data cannot be read or the folder cannot be written.
    """
    console = Console()
    output = _writable_folder(output)
    images = data.LOADERS[dataset]()
    per_class = TRAIN_PER_CLASS[dataset]
    console.print(
        f"{dataset}: {per_class} training images of each of {images.classes} classes, {epochs} epochs, "
        f"{seeds} seeds; one hidden layer, Adam; the settings are defaults, nothing was tuned."
    )
    results = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=2 * seeds * epochs)
        tick = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: progress.advance(task))
        for seed in range(seeds):
            split = data.split(images, per_class, seed=seed)
            progress.update(task, description=f"seed {seed + 1}/{seeds}, softmax")
            model = _softmax_model(split, images.classes, seed)
            _fit(model, split.train, seed, epochs, tick)
            logits = model.predict(split.test[0], batch_size=1000, verbose=0)
            _record(results, "softmax", tf.nn.log_softmax(logits).numpy(), split.test[1])
            progress.update(task, description=f"seed {seed + 1}/{seeds}, DropMax")
            model = _dropmax_model(split, images.classes, seed)
            _fit(model, split.train, seed, epochs, tick)
            for mode in PREDICT_MODES:
                callbacks = [DropMaxPredict(mode)]
                log_p = model.predict(split.test[0], batch_size=1000, verbose=0, callbacks=callbacks)
                _record(results, f'DropMax, mode "{mode}"', log_p, split.test[1])
    console.print(_table(results, seeds))
    console.print("sampled: 30 masks; a class that none of them kept has probability 0 there, which the NLL resents.")
    files = {
        "model": output / "model.keras",
        "picture": output / "retain_probabilities.png",
        "numbers": output / "results.json",
    }
    try:
        model.save(files["model"])
        _picture(model, split.test).savefig(files["picture"], dpi=150)
        files["numbers"].write_text(json.dumps({"dataset": dataset, "epochs": epochs, "results": results}, indent=2))
    except OSError as error:
        raise UserError(f"The results cannot be written to {output} ({error.strerror or error}).") from error
    for what, path in files.items():
        console.print(f"{what}: {path}", soft_wrap=True)
    return results


def _writable_folder(path):
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"The output folder {path} cannot be written ({error.strerror or error}).") from error
    return path


def _softmax_model(split, classes, seed):
    head = keras.layers.Dense(classes, kernel_initializer=keras.initializers.GlorotUniform(seed))
    model = keras.Sequential([networks.mlp(split.train[0].shape[1:], seed), head])
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def _dropmax_model(split, classes, seed):
    model = keras.Sequential([networks.mlp(split.train[0].shape[1:], seed), DropMaxHead(classes, seed=seed)])
    model.compile(keras.optimizers.Adam(1e-3), DropMaxLoss())
    return model


def _fit(model, train, seed, epochs, tick):
    batches = tf.data.Dataset.from_tensor_slices(train).shuffle(len(train[1]), seed=seed).batch(BATCH)
    model.fit(batches, epochs=epochs, shuffle=False, verbose=0, callbacks=[tick])


def _record(results, row, log_probabilities, labels):
    for name, measure in MEASURES.items():
        results.setdefault(row, {}).setdefault(name, []).append(measure(log_probabilities, labels))


def _table(results, seeds):
    table = Table(title=f"Test set, mean +- standard deviation over {seeds} seeds")
    table.add_column("head")
    for name in MEASURES:
        table.add_column(name, justify="right")
    for row, measures in results.items():
        cells = [f"{np.mean(v):.3f} +- {np.std(v, ddof=1) if seeds > 1 else 0:.3f}" for v in measures.values()]
        table.add_row(row, *cells)
    return table


def _picture(model, test):
    """The easiest and the hardest test images, with their retain probabilities."""
    x, y = test
    log_p = model.predict(x, batch_size=1000, verbose=0)
    shown = np.concatenate(plots.easy_and_hard(log_p, y))
    retain = model.layers[-1].retain_probabilities(model.layers[0](x[shown]))
    return plots.examples(x[shown], retain, log_p[shown], y[shown])
