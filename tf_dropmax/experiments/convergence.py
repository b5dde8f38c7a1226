"""Figure 3: cross entropy and error of training and test data in the course of training."""

from functools import partial
from pathlib import Path

import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from tf_dropmax import plots
from tf_dropmax.experiments import runner, train
from tf_dropmax.experiments.errors import UserError


def run(results, methods=None, seeds=5, workers=2, output=None):
    """Trains again what `table1` chose, measures on the way, prints a table, and draws `plots.convergence`.

    Args:
        results: Path of a results file of `table1`, which has the settings.
        methods: Sequence of names of systems, or `None`: all that the file has final runs of. Defaults to `None`.
        seeds: Positive int, number of runs of each method, seeds 0, 1, ... Defaults to 5.
        workers: Positive int, number of processes. Defaults to 2.
        output: Path of the results file, which is added to, or `None`: `RESULTS-convergence.jsonl`. The
            picture is beside it, a `.png`. Defaults to `None`.

    Raises:
        UserError: if `results` has no final runs of a method; if the picture cannot be written; and as `runner.run`.
    """
    results = Path(results)
    chosen = {r["job"]["method"]: r["job"] for r in runner.read(results).values() if r["job"]["phase"] == "final"}
    methods = list(dict.fromkeys(methods or chosen))
    absent = [method for method in methods if method not in chosen]
    if absent or not methods:
        raise UserError(f"{results} has no final runs of {', '.join(absent) or 'any system'}; `table1` makes them.")
    output = Path(output or results.with_name(f"{results.stem}-convergence.jsonl"))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    jobs = [{**chosen[method], "seed": seed, "phase": "curve"} for seed in range(seeds) for method in methods]
    execute = partial(train.execute, folder=str(output.with_suffix(".part")))
    records = runner.run(execute, jobs, output, workers, console)
    found = curves(records)
    console.print(_table(found))
    picture = output.with_suffix(".png")
    try:
        plots.convergence(found).savefig(picture, dpi=150)
    except OSError as error:
        raise UserError(f"The picture cannot be written to {picture} ({error.strerror or error}).") from error
    console.print(f"picture: {picture}", soft_wrap=True)


def curves(records):
    """The curves of runs.

    Args:
        records: Sequence of records of phase `"curve"`.

    Returns:
        `{method: {"step": (points,), "train NLL": (seeds, points), "test NLL": ..., "train error %": ..., ...}}`, arrays.
    """
    found = {}
    for record in records:
        points = record["result"]["curve"]
        curve = found.setdefault(record["job"]["method"], {"step": [point["step"] for point in points]})
        for part in ("train", "test"):
            for measure in points[0][part]:
                curve.setdefault(f"{part} {measure}", []).append([point[part][measure] for point in points])
    return {method: {name: np.array(values) for name, values in curve.items()} for method, curve in found.items()}


def _table(found):
    parts = ("train NLL", "test NLL", "train error %", "test error %")
    table = Table(title="means over the seeds", box=MARKDOWN)
    for name in ("method", "step", *parts):
        table.add_column(name)
    for method, curve in found.items():
        for point in range(0, len(curve["step"]), 3):
            values = [f"{curve[part][:, point].mean():.4f}" for part in parts]
            table.add_row(method, str(curve["step"][point]), *values)
    return table
