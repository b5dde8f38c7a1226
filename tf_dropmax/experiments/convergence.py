"""Figure 3 of the paper: cross entropy and error of training and test data during training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import MARKDOWN
from rich.table import Table

from tf_dropmax import plots
from tf_dropmax.experiments import runner, train
from tf_dropmax.experiments.console import wide_console
from tf_dropmax.experiments.errors import UserError, writing

Curve = dict[str, np.ndarray]


def run(
    results: Path | str,
    methods: Sequence[str] | None = None,
    seeds: int = 5,
    workers: int = 2,
    output: Path | str | None = None,
) -> None:
    """Repeats the final runs of `table1`, measures during training, prints a table and draws it.

    Args:
        results: Path of a results file of `table1`, which contains the settings.
        methods: Sequence of names of systems. `None` takes all that have final runs in the file.
            Defaults to `None`.
        seeds: Positive int, number of runs of each method. Defaults to 5.
        workers: Positive int, number of processes. Defaults to 2.
        output: Path of the results file. The picture is beside it, with the suffix `.png`. `None`
            is `RESULTS-convergence.jsonl`. Defaults to `None`.

    Raises:
        UserError: If `results` has no final runs of a method, or the picture cannot be written,
            or as `runner.run`.
    """
    results = Path(results)
    jobs = [record["job"] for record in runner.read(results).values()]
    chosen = {job["method"]: job for job in jobs if job["phase"] == "final"}
    methods = list(dict.fromkeys(methods or chosen))
    absent = [method for method in methods if method not in chosen]
    if absent or not methods:
        names = ", ".join(absent) or "any system"
        raise UserError(f"{results} has no final runs of {names}. `table1` makes them.")
    output = Path(output or results.with_name(f"{results.stem}-convergence.jsonl"))
    console = wide_console(160)
    jobs = [
        {**chosen[method], "seed": seed, "phase": "curve"}
        for seed in range(seeds)
        for method in methods
    ]
    execute = partial(train.execute, folder=str(output.with_suffix(".part")))
    found = curves(runner.run(execute, jobs, output, workers, console))
    console.print(_table(found))
    picture = output.with_suffix(".png")
    with writing(f"The picture {picture}"):
        plots.convergence(found).savefig(picture, dpi=150)
    console.print(f"picture: {picture}", soft_wrap=True)


def curves(records: Sequence[runner.Record]) -> dict[str, Curve]:
    """The curves of runs.

    Args:
        records: Sequence of records of phase `"curve"`.

    Returns:
        `{method: {"step": (points,), "train NLL": (seeds, points), "test NLL": ..., "train error
        %": ..., ...}}`, where the shapes are those of arrays.
    """
    found: dict[str, Any] = {}
    for record in records:
        points = record["result"]["curve"]
        steps = [point["step"] for point in points]
        curve = found.setdefault(record["job"]["method"], {"step": steps})
        for part in ("train", "test"):
            for measure in points[0][part]:
                values = [point[part][measure] for point in points]
                curve.setdefault(f"{part} {measure}", []).append(values)
    return {
        method: {name: np.array(values) for name, values in curve.items()}
        for method, curve in found.items()
    }


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
