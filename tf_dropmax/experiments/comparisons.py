"""The comparisons: Table 1 of the paper, and one line changed with nothing tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tf_dropmax.experiments import data, reports, runner, train
from tf_dropmax.experiments.console import UserError, wide_console
from tf_dropmax.experiments.systems import ALL, DECAYS, FEATURE_DECAYS, GROUPS, System

Variant = dict[str, Any]  # What distinguishes jobs of the same method.

SEARCH_SEED = 1000  # Seed of the searches. The final runs have seeds 0, 1, ...


def table1(
    column: str,
    protocol: str = "released",
    methods: Sequence[str] = ("paper",),
    seeds: int = 5,
    iterations: int | None = None,
    workers: int = 2,
    budget: int = 6,
    curves: bool = False,
    output: Path | str | None = None,
) -> None:
    """Searches settings on validation data, trains, and prints the table of test errors.

    Jobs that the results file contains are not repeated.

    Args:
        column: A key of `train.COLUMNS`.
        protocol: A key of `train.PROTOCOLS`. Defaults to `"released"`.
        methods: Sequence of names of systems, or of groups: keys of `ALL` and `GROUPS`. Group
            `"paper"` is the systems of the paper, `"untuned"` those of `untuned`, `"parts"` DropMax
            with parts of its objective switched off, `"peers"` other ways to improve a softmax.
            Defaults to `("paper",)`.
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
        curves: Bool. `True` also measures during the final runs, and draws Figure 3. The picture is
            beside the results file, with the suffix `.png`. Defaults to `False`.
        output: Path of the results file. `None` is `table1-COLUMN-PROTOCOL.jsonl`. Defaults to
            `None`.

    Raises:
        UserError: If an argument is not as above, or the data cannot be read, or as `runner.run`.
    """
    chosen = _systems(methods)
    if budget > len(DECAYS):
        raise UserError(
            f"The budget is at most {len(DECAYS)}, so that all methods can use it. "
            f"Received: {budget}."
        )
    default = train.PROTOCOLS[protocol].iterations or train.COLUMNS[column].iterations
    same = {"column": column, "protocol": protocol, "iterations": iterations or default}
    output = Path(output or f"table1-{column}-{protocol}.jsonl")

    def run_jobs(phase, seeds, variants):
        jobs = [
            {**same, "method": method, "seed": seed, "phase": phase, **variant}
            for seed in seeds
            for method, tried in variants.items()
            for variant in tried
        ]
        return _run(jobs, output, workers)

    finals = _finals(
        chosen,
        train.COLUMNS[column].classes,
        budget,
        FEATURE_DECAYS if train.PROTOCOLS[protocol].learns_features else FEATURE_DECAYS[:1],
        partial(run_jobs, "search", [SEARCH_SEED]),
    )
    records = run_jobs("curve" if curves else "final", range(seeds), finals)
    reports.show(records, output.with_suffix(".png") if curves else None)


# Column, protocol, training steps of every method, seeds.
TASKS = {
    "lenet-1k": ("mnist-1k", "released", 2000, 5),
    "lenet-dropout-1k": ("mnist-1k", "released-dropout", 2000, 5),
    "lenet-5k": ("mnist-5k", "released", 2000, 5),
    "cnn-1k": ("mnist-1k", "cnn", 800, 5),  # 25 epochs
    "resnet-cifar-5k": ("cifar-10-5k", "small-resnet", 1000, 3),
    "omniglot-242": ("omniglot-242", "released", 4440, 5),
    "omniglot-968": ("omniglot-968", "released", 4380, 3),
    "digits": ("digits", "small", 2400, 5),
    "banking77-10": ("banking77-10", "hidden", 1000, 5),
    "banking77": ("banking77", "hidden", 3000, 5),
    "clinc150-10": ("clinc150-10", "hidden", 8000, 5),
    "clinc150": ("clinc150", "hidden", 3000, 5),
}


def untuned(
    tasks: Sequence[str] = tuple(TASKS),
    methods: Sequence[str] = ("untuned",),
    seeds: int | None = None,
    workers: int = 2,
    output: Path | str = "untuned.jsonl",
) -> None:
    """Trains every method with default settings on every task, and prints tables.

    Nothing is searched. Weight decay is 1e-4, as in the authors' code. The last table has, for each
    method, on how many tasks it is better and on how many it is worse than the softmax.

    Args:
        tasks: Sequence of keys of `TASKS`. Defaults to all.
        methods: As for `table1`. Defaults to `("untuned",)`.
        seeds: Positive int, number of runs of each method. `None` takes those of the task. Defaults
            to `None`.
        workers: Positive int, number of processes. Defaults to 2.
        output: Path of the results file. Defaults to `"untuned.jsonl"`.

    Raises:
        UserError: As `table1`.
    """
    systems = _systems(methods)
    jobs = []
    for column, protocol, iterations, most in (TASKS[name] for name in tasks):
        same = {"column": column, "protocol": protocol, "iterations": iterations, "phase": "final"}
        finals = _finals(systems, train.COLUMNS[column].classes)
        jobs += [
            {**same, "method": method, "seed": seed, **variant}
            for seed in range(seeds or most)
            for method, (variant,) in finals.items()
        ]
    reports.show(_run(jobs, Path(output), workers))


def _run(jobs, output, workers):
    # Before the workers start, so that a missing file is one error and a download happens once.
    for dataset in {train.COLUMNS[job["column"]].dataset for job in jobs}:
        data.LOADERS[dataset]()
    execute = partial(train.execute, folder=str(output.with_suffix(".part")))
    return runner.run(execute, jobs, output, workers, wide_console())


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
    budget: int = 1,
    feature_decays: Sequence[float] = FEATURE_DECAYS,
    search: Callable[[dict[str, list[Variant]]], list[runner.Record]] | None = None,
) -> dict[str, list[Variant]]:
    """The best settings of each method, and the temperatures of their predictions.

    Args:
        systems: Dictionary of systems by method.
        classes: Number of classes.
        budget: As for `table1`. Defaults to 1.
        feature_decays: The L2 penalties of the features that may be tried.
        search: Function from lists of variants by method to the records of their runs. A budget
            of 1 needs none.

    Returns:
        Dictionary of lists with one variant, by method.
    """
    options = {method: system.options_for(classes) for method, system in systems.items()}
    defaults = {method: {"l2": DECAYS[0], **own[0]} for method, own in options.items()}
    if budget == 1 or search is None:
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
        records = search(tried)
        found = {
            method: min((r for r in records if r["job"]["method"] == method), key=_validation)
            for method in systems
        }
        best = {method: record["job"]["settings"] for method, record in found.items()}
    return {
        method: [{"settings": best[method], "temperatures": record["result"]["temperatures"]}]
        for method, record in found.items()
    }


def _validation(record):
    """Validation error, ties broken by likelihood. A run that diverged comes last."""
    measures = next(iter(record["result"]["measures"].values()))
    pair = (measures["error %"], measures["NLL"])
    return pair if np.isfinite(pair).all() else (np.inf, np.inf)
