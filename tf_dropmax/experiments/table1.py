"""Table 1 of the paper.

The settings of every system are searched on validation data, with the same budget. The chosen
settings are then measured on test data, with several seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import MARKDOWN
from rich.table import Table
from scipy import stats

from tf_dropmax.experiments import data, runner, train
from tf_dropmax.experiments.console import wide_console
from tf_dropmax.experiments.errors import UserError
from tf_dropmax.experiments.systems import ALL, DECAYS, FEATURE_DECAYS, GROUPS, System

Variant = dict[str, Any]  # What distinguishes jobs of the same method.

SEARCH_SEED = 1000  # Seed of the searches. The final runs have seeds 0, 1, ...

# Test error in percent, as published in Table 1 of the submission. `label` is NeurIPS 2018, where
# the softmax has 7.09, 30.60 and 30.29.
_COLUMNS = ("mnist-1k", "mnist-5k", "mnist-55k", "cifar-10", "cifar-100", "awa2")
_PUBLISHED = {
    ("base", "(2)"): (7.17, 2.19, 0.84, 7.97, 30.81, 26.77),
    ("sampled-uniform", "(2)"): (7.48, 2.17, 0.91, 8.29, 30.52, 28.04),
    ("sampled-learned", "(2)"): (7.62, 2.45, 0.85, 8.37, 30.58, 26.60),
    ("sparsemax", "sparsemax"): (6.84, 2.28, 0.82, 7.73, 31.54, 28.41),
    ("attention", "(18)"): (7.15, 2.17, 0.70, 7.64, 29.60, 26.85),
    ("random", "(17) S=30"): (7.11, 2.23, 0.89, 8.88, 30.84, 27.55),
    ("random", "(18)"): (7.43, 2.33, 0.89, 8.09, 30.35, 26.81),
    ("adaptive", "(17) S=30"): (6.56, 1.96, 0.77, 7.49, 29.56, 26.40),
    ("adaptive", "(18)"): (6.59, 1.95, 0.75, 7.47, 29.58, 26.44),
    ("label", "(18)"): (5.32, None, None, None, 29.87, 26.91),
}
# {column: {(method, row): test error}}
PAPER = {
    column: {
        key: errors[number] for key, errors in _PUBLISHED.items() if errors[number] is not None
    }
    for number, column in enumerate(_COLUMNS)
}


def run(
    column: str,
    protocol: str = "released",
    methods: Sequence[str] = ("paper",),
    seeds: int = 5,
    iterations: int | None = None,
    workers: int = 2,
    budget: int = 6,
    weights: Path | str | None = None,
    output: Path | str | None = None,
) -> None:
    """Searches, trains and prints the table. Jobs that the results file contains are not repeated.

    Args:
        column: A key of `train.COLUMNS`.
        protocol: A key of `train.PROTOCOLS`. Defaults to `"released"`.
        methods: Sequence of names of systems, or of groups: keys of `ALL` and `GROUPS`. Group
            `"paper"` is the systems of the paper, `"parts"` DropMax with parts of its objective
            switched off, `"peers"` other ways to improve a softmax. Defaults to `("paper",)`.
        seeds: Positive int, number of final runs of each method. Defaults to 5.
        iterations: Positive int, training steps of a run. `None` takes those of the protocol.
            Defaults to `None`.
        workers: Positive int, number of processes. Defaults to 2.
        budget: Positive int, at most 9, number of settings that are tried for each method. First
            weight decays are tried, then L2 penalties of the features with the best weight decay,
            then the method's own settings with the best of both. Each of the last two uses at most
            a third of the budget. The calibrated measures have the temperature that is fitted to
            the validation data of the best trial. 1 searches and calibrates nothing: each method
            has its default settings and the weight decay of the authors' code. Defaults to 6.
        weights: Path of a `.weights.h5` file from which the network without its head starts.
            `None` starts from random weights. Defaults to `None`.
        output: Path of the results file. `None` is `table1-COLUMN-PROTOCOL.jsonl`. Defaults to
            `None`.

    Raises:
        UserError: If an argument is not as above, or the data cannot be read, or as `runner.run`.
    """
    console = wide_console(220)
    chosen = _systems(methods)
    if budget > len(DECAYS):
        raise UserError(
            f"The budget is at most {len(DECAYS)}, so that all methods can use it. "
            f"Received: {budget}."
        )
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"There is no file of weights {weights}.")
    # Before the workers start, so that a missing file is one error and a download happens once.
    data.require(train.COLUMNS[column].dataset)
    default = train.PROTOCOLS[protocol].iterations or train.COLUMNS[column].iterations
    same = {"column": column, "protocol": protocol, "iterations": iterations or default}
    if weights is not None:
        same["weights"] = str(Path(weights).resolve())
    console.print(f"The network starts from {'random weights' if weights is None else weights}.")
    output = Path(output or f"table1-{column}-{protocol}.jsonl")
    execute = partial(train.execute, folder=str(output.with_suffix(".part")))

    def run_jobs(phase, seeds, variants):
        jobs = [
            {**same, "method": method, "seed": seed, "phase": phase, **variant}
            for seed in seeds
            for method, tried in variants.items()
            for variant in tried
        ]
        return runner.run(execute, jobs, output, workers, console)

    finals = _finals(
        chosen,
        train.COLUMNS[column].classes,
        budget,
        FEATURE_DECAYS if train.PROTOCOLS[protocol].learns_features else FEATURE_DECAYS[:1],
        partial(run_jobs, "search", [SEARCH_SEED]),
    )
    console.print(table(run_jobs("final", range(seeds), finals)))


def _systems(names: Sequence[str]) -> dict[str, System]:
    """The systems with some names or in groups with some names, by name."""
    unknown = [name for name in names if name not in ALL and name not in GROUPS]
    if unknown:
        raise UserError(
            f"The methods are {', '.join(ALL)}. Groups of methods are {', '.join(GROUPS)}. "
            f"Received: {', '.join(unknown)}."
        )
    groups = (GROUPS.get(name) or {name: ALL[name]} for name in names)
    return {method: system for group in groups for method, system in group.items()}


def _finals(
    systems: dict[str, System],
    classes: int,
    budget: int,
    feature_decays: Sequence[float],
    search: Callable[[dict[str, list[Variant]]], list[runner.Record]],
) -> dict[str, list[Variant]]:
    """The best settings of each method, and the temperatures of their predictions.

    Args:
        systems: Dictionary of systems by method.
        classes: Number of classes.
        budget: As for `run`.
        feature_decays: The L2 penalties of the features that may be tried.
        search: Function from lists of variants by method to the records of their runs.

    Returns:
        Dictionary of lists with one variant, by method.
    """
    options = {method: system.options_for(classes) for method, system in systems.items()}
    defaults = {method: {"l2": DECAYS[0], **own[0]} for method, own in options.items()}
    if budget == 1:
        return {method: [{"settings": settings}] for method, settings in defaults.items()}
    penalties = [{"feature_decay": decay} for decay in feature_decays[1:][: budget // 3]]

    def stages_of(own):
        others = own[1:][: budget // 3]
        count = budget - len(penalties) - len(others)
        return [{"l2": decay} for decay in DECAYS[1:count]], penalties, others

    stages = {method: stages_of(own) for method, own in options.items()}
    best, found = defaults, {}
    for stage in range(3):
        tried = {
            method: [{"settings": {**best[method], **change}} for change in ({}, *changes[stage])]
            for method, changes in stages.items()
        }
        found = _best(search(tried))
        best = {method: record["job"]["settings"] for method, record in found.items()}
    return {
        method: [{"settings": best[method], "temperatures": record["result"]["temperatures"]}]
        for method, record in found.items()
    }


def _best(records):
    """The record with the smallest validation error of each method."""
    best: dict[str, runner.Record] = {}
    for record in records:
        method = record["job"]["method"]
        best[method] = min(best.get(method, record), record, key=_validation)
    return best


def _validation(record):
    """Validation error, ties broken by likelihood. A run that diverged comes last."""
    measures = next(iter(record["result"]["measures"].values()))
    pair = (measures["error %"], measures["NLL"])
    return pair if np.isfinite(pair).all() else (np.inf, np.inf)


def table(records: Sequence[runner.Record]) -> Table:
    """The table of final runs, with one row for each way to predict of each method.

    Args:
        records: Sequence of records of phase `"final"`, of one column, with the same seeds for
            every method.

    Returns:
        A `rich.table.Table`.
    """
    job = records[0]["job"]
    seeds = len({record["job"]["seed"] for record in records})
    chosen = {record["job"]["method"]: record["job"]["settings"] for record in records}
    result = Table(
        title=f"{job['column']}, protocol {job['protocol']}, {job['iterations']} iterations, "
        f"{seeds} seeds: test error in percent",
        caption="difference: mean of the paired differences to base, with its 95 % confidence "
        "interval",
        box=MARKDOWN,
    )
    further = list(
        dict.fromkeys(
            name
            for record in records
            for measures in record["result"]["measures"].values()
            for name in measures
            if name != "error %"
        )
    )
    for name in ("method", "predicted by", "median", "mean +- sd", *further, "difference"):
        result.add_column(name)
    for name in ("ms/step", "settings", "paper"):
        result.add_column(name)
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for record in records:
        for row, measures in record["result"]["measures"].items():
            of_row = values.setdefault((record["job"]["method"], row), {})
            for name, value in measures.items():
                of_row.setdefault(name, []).append(value)
    times: dict[str, list[float]] = {}
    for record in records:
        milliseconds = 1000 * record["result"]["seconds"] / record["result"]["steps"]
        times.setdefault(record["job"]["method"], []).append(milliseconds)
    base = values.get(("base", "(2)"))
    for (method, row), measures in values.items():
        errors = np.array(measures["error %"])
        result.add_row(
            method,
            row,
            f"{np.median(errors):.2f}",
            f"{errors.mean():.2f} +- {errors.std(ddof=1) if seeds > 1 else np.nan:.2f}",
            *(
                f"{np.mean(measures[name]):.{2 if '%' in name else 3}f}" if name in measures else ""
                for name in further
            ),
            _difference(errors, base) if base and method != "base" else "",
            f"{np.median(times[method]):.1f}",
            ", ".join(f"{name} {value:g}" for name, value in chosen[method].items()),
            str(PAPER.get(job["column"], {}).get((method, row), "")),
        )
    return result


def _difference(errors, base):
    differences = errors - np.array(base["error %"])
    mean = differences.mean()
    if len(differences) < 2:
        return f"{mean:+.2f}"
    half = stats.sem(differences) * stats.t.ppf(0.975, len(differences) - 1)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
