"""Tables and figures from the records of runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.box import MARKDOWN
from rich.table import Table
from scipy import stats

from tf_dropmax import plots
from tf_dropmax.experiments import runner
from tf_dropmax.experiments.console import UserError, wide_console, writing
from tf_dropmax.experiments.measures import MEASURES

BySeed = dict[int, dict[str, float]]  # The measures of runs that differ in the seed only.


def show(records: Sequence[runner.Record], picture: Path | None = None) -> None:
    """Prints a table for every task, and one for all if there are several, and draws the curves.

    Args:
        records: Sequence of records. Those of searches are left out.
        picture: Path of the picture of the curves of the runs of phase `"curve"`, or `None` for
            no picture. Defaults to `None`.

    Raises:
        UserError: If there is nothing to show, or the picture cannot be written.
    """
    console = wide_console()
    finals = [record for record in records if record["job"]["phase"] != "search"]
    if not finals:
        raise UserError("There are no final runs.")
    by_task = [list(group) for _, group in groupby(sorted(finals, key=_task), _task)]
    for group in by_task:
        console.print(table(group))
    if len(by_task) > 1:
        console.print(overview(finals))
        console.print(summary(finals))
    if picture:
        figure = plots.convergence(curves(finals), ("train NLL", "test NLL", "test error %"))
        with writing(f"The picture {picture}"):
            figure.savefig(picture, dpi=150)
        console.print(f"picture: {picture}", soft_wrap=True)


def read(files: Sequence[Path | str], picture: Path | str | None = None) -> None:
    """As `show`, for the records of results files."""
    for file in files:
        if not Path(file).exists():
            raise UserError(f"There is no file {file}.")
    records = [record for file in files for record in runner.read(file).values()]
    show(records, None if picture is None else Path(picture))


def _task(record):
    job = record["job"]
    return job["column"], job["protocol"], job["iterations"]


def table(records: Sequence[runner.Record]) -> Table:
    """The table of one task, with one row for each way to predict of each method.

    Args:
        records: Sequence of records of final runs with the same column, protocol and iterations.

    Returns:
        A `rich.table.Table`.
    """
    column, protocol, iterations = _task(records[0])
    runs: dict[tuple[str, str, str], BySeed] = {}
    times: dict[tuple[str, str], list[float]] = {}
    for record in records:
        job = record["job"]
        settings = ", ".join(f"{name} {value:g}" for name, value in job["settings"].items())
        times.setdefault((job["method"], settings), []).append(_milliseconds(record))
        for row, measures in record["result"]["measures"].items():
            runs.setdefault((job["method"], row, settings), {})[job["seed"]] = measures
    names = (name for run in runs.values() for measures in run.values() for name in measures)
    further = [name for name in dict.fromkeys(names) if name != "error %"]
    result = Table(
        *("method", "predicted by", "seeds", "median", "mean +- sd", *further),
        *("difference", "ms/step", "settings"),
        title=f"{column}, protocol {protocol}, {iterations} steps: test error in percent",
        caption="difference: mean of the paired differences to the softmax, with its 95 % "
        "confidence interval",
        box=MARKDOWN,
    )
    base = next((run for (method, *_), run in runs.items() if method == "softmax"), {})
    for (method, row, settings), run in runs.items():
        errors = np.array([measures["error %"] for measures in run.values()])
        result.add_row(
            method,
            row,
            str(len(run)),
            f"{np.median(errors):.2f}",
            f"{errors.mean():.2f} +- {errors.std(ddof=1) if len(run) > 1 else math.nan:.2f}",
            *(_mean(run, name) for name in further),
            "" if method == "softmax" else _difference(run, base),
            f"{np.median(times[method, settings]):.1f}",
            settings,
        )
    return result


def _milliseconds(record):
    return 1000 * record["result"]["seconds"] / record["result"]["steps"]


def _mean(run: BySeed, name: str) -> str:
    values = [measures[name] for measures in run.values() if name in measures]
    return f"{np.mean(values):.{2 if '%' in name else 3}f}" if values else ""


def _difference(run: BySeed, base: BySeed) -> str:
    mean, low, high = interval(run, base, "error %")
    if math.isnan(mean):
        return ""
    return f"{mean:+.2f}" + ("" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]")


def interval(run: BySeed, base: BySeed, measure: str) -> tuple[float, float, float]:
    """The mean of the paired differences of a measure, and its 95 % confidence interval.

    Args:
        run, base: Dictionaries `{seed: {measure: number}}`. Seeds that only one has are left out.
        measure: String.

    Returns:
        Mean and limits, NaN where there are too few seeds.
    """
    differences = [run[seed][measure] - base[seed][measure] for seed in run if seed in base]
    if not differences:
        return math.nan, math.nan, math.nan
    mean, half = float(np.mean(differences)), math.nan
    if len(differences) > 1:
        half = stats.sem(differences) * stats.t.ppf(0.975, len(differences) - 1)
    return mean, mean - half, mean + half


def _by_task(records: Sequence[runner.Record]) -> dict[Any, dict[tuple[str, str], BySeed]]:
    """The measures, `{task: {(method, way to predict): {seed: measures}}}`."""
    found: dict[Any, dict[tuple[str, str], BySeed]] = {}
    for record in records:
        job, runs = record["job"], found.setdefault(_task(record), {})
        for row, measures in record["result"]["measures"].items():
            run = runs.setdefault((job["method"], row), {})
            run[job["seed"]] = {**measures, "ms": _milliseconds(record)}
    return found


def overview(records: Sequence[runner.Record]) -> Table:
    """Error in percent / NLL / ECE in percent of every method on every task.

    Args:
        records: Sequence of records of final runs.

    Returns:
        A `rich.table.Table`, means over the seeds, with one row for each way to predict.
    """
    tasks = _by_task(records)
    names = (f"{column}, {protocol}, {steps} steps" for column, protocol, steps in tasks)
    title = "error % / NLL / ECE %"
    result = Table("method", "predicted by", *names, title=title, box=MARKDOWN)
    for key in dict.fromkeys(key for runs in tasks.values() for key in runs):
        cells = (
            " / ".join(_mean(runs.get(key, {}), name) for name in MEASURES)
            for runs in tasks.values()
        )
        result.add_row(*key, *cells)
    return result


def summary(records: Sequence[runner.Record]) -> Table:
    """On how many tasks each method is better than the softmax, and on how many it is worse.

    A task counts if the 95 % confidence interval of the paired difference excludes 0.

    Args:
        records: Sequence of records of final runs.

    Returns:
        A `rich.table.Table`. Its last column is the time of a training step: the median over the
        tasks of the ratio to the softmax.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    times: dict[tuple[str, str], list[float]] = {}
    for runs in _by_task(records).values():
        base = runs.pop(("softmax", "(2)"), {})
        for key, run in runs.items():
            count = counts.setdefault(key, Counter())
            count["tasks"] += 1
            for measure in MEASURES:
                _, low, high = interval(run, base, measure)
                count[f"{measure} better"] += bool(high < 0)
                count[f"{measure} worse"] += bool(low > 0)
            ratios = [run[seed]["ms"] / base[seed]["ms"] for seed in run if seed in base]
            times.setdefault(key, []).append(median(ratios or [math.nan]))
    columns = ("tasks", *(f"{name} {word}" for name in MEASURES for word in ("better", "worse")))
    headers = ("method", "predicted by", *columns, "time of a step")
    result = Table(*headers, title="compared with the softmax", box=MARKDOWN)
    for key, count in counts.items():
        numbers = (str(count[name]) for name in columns)
        result.add_row(*key, *numbers, f"{median(times[key]):.2f}")
    return result


def curves(records: Sequence[runner.Record]) -> dict[str, dict[str, np.ndarray]]:
    """The curves of runs, for `plots.convergence`: Figure 3 of the paper.

    Args:
        records: Sequence of records. Those without a curve are left out.

    Returns:
        `{method: {"step": (points,), "train NLL": (seeds, points), "test NLL": ..., "train error
        %": ..., ...}}`, where the shapes are those of arrays.

    Raises:
        UserError: If no record has a curve.
    """
    found: dict[str, Any] = {}
    for record in records:
        points = record["result"].get("curve", ())
        if not points:
            continue
        curve = found.setdefault(record["job"]["method"], {})
        curve["step"] = [point["step"] for point in points]
        for part in ("train", "test"):
            for measure in MEASURES:
                values = [point[part][measure] for point in points]
                curve.setdefault(f"{part} {measure}", []).append(values)
    if not found:
        raise UserError("There are no curves. `table1 --curves` measures them.")
    return {
        method: {name: np.array(values) for name, values in curve.items()}
        for method, curve in found.items()
    }
