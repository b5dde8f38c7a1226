"""The demo: the same small network with a plain softmax and with DropMax."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tf_dropmax import DropMaxPredict, plots
from tf_dropmax.experiments import data, networks
from tf_dropmax.experiments.console import writing
from tf_dropmax.experiments.measures import MEASURES, measures_of
from tf_dropmax.experiments.systems import ALL

TRAIN_PER_CLASS = {"digits": 30, "mnist": 100}
BATCH = 50
MODES = ("expected", "sampled", "exact", "softmax")

Results = dict[str, dict[str, list[float]]]


def run(
    dataset: str = "digits", seeds: int = 5, epochs: int = 200, output: Path | str = "dropmax-demo"
) -> Results:
    """Trains, measures, prints a table, and saves a model, a picture and the numbers.

    Args:
        dataset: `"digits"` or `"mnist"`. Defaults to `"digits"`.
        seeds: Positive int, number of runs of each network. The seed of a run determines its
            split, initial weights, order of batches and masks. Defaults to 5.
        epochs: Positive int. Defaults to 200, as in the authors' released code.
        output: Path of the folder for the results. Defaults to `"dropmax-demo"`.

    Returns:
        `{row: {measure: [one number for each seed]}}`.

    Raises:
        UserError: If the data cannot be read or the folder cannot be written.
    """
    console = Console()
    output = Path(output)
    with writing(f"The output folder {output}"):
        output.mkdir(parents=True, exist_ok=True)
    images = data.LOADERS[dataset]()
    per_class = TRAIN_PER_CLASS[dataset]
    console.print(
        f"{dataset}: {per_class} training images of each of {images.classes} classes, {epochs} "
        f"epochs, {seeds} seeds. The network has one hidden layer. All settings are defaults."
    )
    results: Results = {}
    runs = list(product(range(seeds), ("softmax", "prior")))
    for seed, system in track(runs, "training", console=console):
        split = data.split(images, per_class, seed=seed)
        model = _trained(system, split.train, images.classes, seed, epochs)
        for row, log_p in _predictions(system, model, split.test[0]).items():
            for measure, value in measures_of(log_p, split.test[1]).items():
                results.setdefault(row, {}).setdefault(measure, []).append(value)
    console.print(_table(results, seeds))
    model.save(output / "model.keras")
    _picture(model, split.test).savefig(output / "retain_probabilities.png", dpi=150)
    numbers = {"dataset": dataset, "epochs": epochs, "results": results}
    (output / "results.json").write_text(json.dumps(numbers, indent=2))
    for name in ("model.keras", "retain_probabilities.png", "results.json"):
        console.print(output / name, soft_wrap=True)
    return results


def _trained(system, train, classes, seed, epochs):
    head, loss = ALL[system].build(classes, seed, l2=0.0)
    model = keras.Sequential([networks.mlp(train[0].shape[1:], seed), head])
    model.compile(keras.optimizers.Adam(1e-3), loss)
    examples = tf.data.Dataset.from_tensor_slices(train)
    batches = examples.shuffle(len(train[1]), seed=seed).batch(BATCH)
    model.fit(batches, epochs=epochs, shuffle=False, verbose=0)
    return model


def _predictions(system, model, x):
    options = {"batch_size": 1000, "verbose": 0}
    if system == "softmax":
        return {"softmax": tf.nn.log_softmax(model.predict(x, **options)).numpy()}
    return {
        f'DropMax, mode "{mode}"': model.predict(x, callbacks=[DropMaxPredict(mode)], **options)
        for mode in MODES
    }


def _table(results, seeds):
    table = Table(
        "head",
        *MEASURES,
        title=f"Test set, mean +- standard deviation over {seeds} seeds",
        caption='Before `calibrate`, modes "sampled" and "exact" are often underconfident. In mode '
        '"sampled", the NLL is large if none of the 30 masks keeps the class of a label.',
    )
    for row, measures in results.items():
        cells = (f"{np.mean(values):.3f} +- {_spread(values):.3f}" for values in measures.values())
        table.add_row(row, *cells)
    return table


def _spread(values):
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def _picture(model, test):
    """The easiest and the hardest test images with their retain probabilities."""
    x, y = test
    log_p = model.predict(x, batch_size=1000, verbose=0)
    shown = np.concatenate(plots.easy_and_hard(log_p, y))
    retain = model.layers[-1].retain_probabilities(model.layers[0](x[shown]))
    return plots.examples(x[shown], retain, log_p[shown], y[shown])
