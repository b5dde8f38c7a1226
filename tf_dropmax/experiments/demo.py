"""The demo: the same small network with a plain softmax and with DropMax."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tf_dropmax import DropMaxPredict, plots
from tf_dropmax.experiments import data, networks
from tf_dropmax.experiments.errors import writing
from tf_dropmax.experiments.measures import MEASURES, measures_of
from tf_dropmax.experiments.systems import SYSTEMS
from tf_dropmax.inference import PREDICT_MODES

TRAIN_PER_CLASS = {"digits": 30, "mnist": 100}
BATCH = 50
SOFTMAX = "softmax"
DROPMAX = {mode: f'DropMax, mode "{mode}"' for mode in PREDICT_MODES}

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
    output = _writable_folder(output)
    images = data.LOADERS[dataset]()
    per_class = TRAIN_PER_CLASS[dataset]
    console.print(
        f"{dataset}: {per_class} training images of each of {images.classes} classes, {epochs} "
        f"epochs, {seeds} seeds. The network has one hidden layer. All settings are defaults."
    )
    results: Results = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=2 * seeds * epochs)
        tick = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: progress.advance(task)
        )
        for seed in range(seeds):
            split = data.split(images, per_class, seed=seed)
            x, y = split.test
            for name, system in (("softmax", "base"), ("DropMax", "adaptive")):
                progress.update(task, description=f"seed {seed + 1}/{seeds}, {name}")
                model = _trained(system, split.train, images.classes, seed, epochs, tick)
                for row, log_p in _predictions(system, model, x):
                    for measure, value in measures_of(log_p, y).items():
                        results.setdefault(row, {}).setdefault(measure, []).append(value)
    console.print(_table(results, seeds))
    files = {
        "model": output / "model.keras",
        "picture": output / "retain_probabilities.png",
        "numbers": output / "results.json",
    }
    with writing(f"The output folder {output}"):
        model.save(files["model"])
        _picture(model, split.test).savefig(files["picture"], dpi=150)
        numbers = {"dataset": dataset, "epochs": epochs, "results": results}
        files["numbers"].write_text(json.dumps(numbers, indent=2))
    for what, path in files.items():
        console.print(f"{what}: {path}", soft_wrap=True)
    console.print(conclusion(results), soft_wrap=True)
    return results


def _writable_folder(path: Path | str) -> Path:
    path = Path(path)
    with writing(f"The output folder {path}"):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    return path


def _trained(system, train, classes, seed, epochs, tick):
    head, loss = SYSTEMS[system].build(classes, seed, l2=0.0)
    model = keras.Sequential([networks.mlp(train[0].shape[1:], seed), head])
    model.compile(keras.optimizers.Adam(1e-3), loss)
    examples = tf.data.Dataset.from_tensor_slices(train)
    batches = examples.shuffle(len(train[1]), seed=seed).batch(BATCH)
    model.fit(batches, epochs=epochs, shuffle=False, verbose=0, callbacks=[tick])
    return model


def _predictions(system, model, x) -> Iterator[tuple[str, np.ndarray]]:
    options = {"batch_size": 1000, "verbose": 0}
    if system == "base":
        yield SOFTMAX, tf.nn.log_softmax(model.predict(x, **options)).numpy()
        return
    for mode, row in DROPMAX.items():
        yield row, model.predict(x, callbacks=[DropMaxPredict(mode)], **options)


def _table(results, seeds):
    table = Table(
        title=f"Test set, mean +- standard deviation over {seeds} seeds",
        caption='Mode "sampled" draws 30 masks. A class that none of them keeps has probability 0. '
        "If it is the class of the label, the NLL is large.",
    )
    table.add_column("head")
    for name in MEASURES:
        table.add_column(name, justify="right")
    for row, measures in results.items():
        cells = (f"{np.mean(values):.3f} +- {_spread(values):.3f}" for values in measures.values())
        table.add_row(row, *cells)
    return table


def _spread(values):
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def conclusion(results: Results) -> str:
    """One sentence that says whether the softmax or DropMax, mode `"expected"`, was better.

    A difference of the means is compared with the larger standard deviation of the two heads.

    Args:
        results: As `run` returns them.

    Returns:
        String.
    """
    fewer, errors = _winner(results, "error %", "fewer errors ({:.3f} % against {:.3f} %, {})")
    likelier, nll = _winner(results, "NLL", "the better likelihood (NLL {:.3f} against {:.3f}, {})")
    link = " and" if fewer == likelier else f", but {likelier} had"
    return f"{fewer[0].upper()}{fewer[1:]} had {errors}{link} {nll}."


def _winner(results, measure, text):
    heads = {"the softmax": SOFTMAX, 'DropMax in mode "expected"': DROPMAX["expected"]}
    values = {head: results[row][measure] for head, row in heads.items()}
    means = {head: np.mean(each) for head, each in values.items()}
    low, high = sorted(means.values())
    spread = max(map(_spread, values.values()))
    if len(results[SOFTMAX][measure]) == 1:
        remark = "one seed shows no spread"
    else:
        larger = "larger" if high - low > spread else "not larger"
        remark = f"a difference {larger} than the spread over seeds, {spread:.3f}"
    winner = min(means, key=lambda head: means[head]) if low < high else "neither head"
    return winner, text.format(low, high, remark)


def _picture(model, test):
    """The easiest and the hardest test images with their retain probabilities."""
    x, y = test
    log_p = model.predict(x, batch_size=1000, verbose=0)
    shown = np.concatenate(plots.easy_and_hard(log_p, y))
    retain = model.layers[-1].retain_probabilities(model.layers[0](x[shown]))
    return plots.examples(x[shown], retain, log_p[shown], y[shown])
