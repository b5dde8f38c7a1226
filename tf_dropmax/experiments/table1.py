"""Table 1: settings searched on validation data, with the same budget for every system, then every seed on test data."""

from functools import partial
from pathlib import Path

import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from scipy import stats

from tf_dropmax.experiments import runner, train
from tf_dropmax.experiments.errors import UserError
from tf_dropmax.experiments.systems import DECAYS, GROUPS

SEARCH_SEED = 1000  # of the splits, weights and masks while settings are searched; the final seeds count from 0

# Test error in percent, as published: the submission's Table 1, and for `label` NeurIPS 2018, where the softmax that it is
# compared with has 7.09, 30.60 and 30.29.
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
# {column: {(method, row): figure}}
PAPER = {
    column: {key: figures[number] for key, figures in _PUBLISHED.items() if figures[number] is not None}
    for number, column in enumerate(_COLUMNS)
}


def run(
    column,
    protocol="released",
    systems="paper",
    methods=None,
    seeds=5,
    iterations=None,
    workers=2,
    budget=6,
    weights=None,
    output=None,
):
    """Searches, trains, and prints the table; what is in the results file already is not done again.

    Args:
        column: A key of `train.COLUMNS`.
        protocol: A key of `train.PROTOCOLS`. Defaults to `"released"`.
        systems: A key of `GROUPS`: `"paper"`, the systems that the paper compares; `"parts"`, adaptive DropMax with parts of
            its objective switched off; `"peers"`, other ways to a better softmax. Defaults to `"paper"`.
        methods: Sequence of the names of systems in that group, or `None`: all. Defaults to `None`.
        seeds: Positive int, number of final runs of each method, seeds 0, 1, ... Defaults to 5.
        iterations: Positive int, training steps of a run, or `None`: as the protocol has it. Defaults to `None`.
        workers: Positive int, number of processes. Defaults to 2.
        budget: Positive int, at most 6, number of settings that are tried for each method: up to half of it for what the
            method has of its own, with the best weight decay; the rest before, for weight decays. With 1, nothing is
            searched: each method takes its defaults, and the weight decay of the authors' code. Defaults to 6.
        weights: Path of a `.weights.h5` file from which the network, without its head, starts; or `None`: random weights.
            Defaults to `None`.
        output: Path of the results file, or `None`: `table1-COLUMN-PROTOCOL.jsonl`. Defaults to `None`.

    Raises:
        UserError: as `runner.run`, and if the data cannot be read.
    """
    console = Console()
    if not console.is_terminal:
        console.width = 220  # a table in a file is not to be wrapped
    systems = GROUPS[systems]
    methods = list(dict.fromkeys(methods or systems))
    if not set(methods) <= set(systems):
        raise UserError(f"The methods are {', '.join(systems)}; received {', '.join(methods)}.")
    if budget > len(DECAYS):
        raise UserError(f"The budget is at most {len(DECAYS)}, so that all methods can use it; received {budget}.")
    iterations = iterations or train.PROTOCOLS[protocol].iterations or train.COLUMNS[column].iterations
    output = Path(output or f"table1-{column}-{protocol}.jsonl")
    train.data.LOADERS[train.COLUMNS[column].dataset]()  # a missing file is found now, and not in every worker
    execute = partial(train.execute, folder=str(output.with_suffix(".part")))
    same = {"column": column, "protocol": protocol, "iterations": iterations}
    if weights is not None:
        if not Path(weights).is_file():
            raise UserError(f"There is no file of weights {weights}.")
        same["weights"] = str(Path(weights).resolve())
    console.print(f"The network starts from {'random weights' if weights is None else weights}.")

    def job(method, settings, seed, phase):
        return {**same, "method": method, "settings": settings, "seed": seed, "phase": phase}

    def search(settings):
        """Tries lists of settings, by method; returns the best of each."""
        jobs = [job(method, each, SEARCH_SEED, "search") for method, tried in settings.items() for each in tried]
        records = runner.run(execute, jobs, output, workers, console)
        mine = {method: [record for record in records if record["job"]["method"] == method] for method in settings}
        best = {method: min(mine[method], key=_validation) for method in settings}
        fitted.update({method: record["result"].get("fitted", {}) for method, record in best.items()})
        return {method: record["job"]["settings"] for method, record in best.items()}

    fitted = {}
    options = {method: systems[method].options_for(train.COLUMNS[column].classes) for method in methods}
    chosen = {method: {"l2": DECAYS[0], **options[method][0]} for method in methods}
    if budget > 1:
        others = {method: options[method][1:][: budget // 2] for method in methods}
        decays = {method: DECAYS[: budget - len(others[method])] for method in methods}
        chosen = search({method: [{**chosen[method], "l2": l2} for l2 in decays[method]] for method in methods})
        best = {method: [chosen[method], *({**chosen[method], **other} for other in others[method])] for method in methods}
        chosen = search(best)
    chosen = {method: {**settings, **fitted.get(method, {})} for method, settings in chosen.items()}
    finals = [job(method, chosen[method], seed, "final") for seed in range(seeds) for method in methods]
    records = runner.run(execute, finals, output, workers, console)
    console.print(table(records))


def _validation(record):
    """Validation error, ties broken by likelihood; a run that diverged comes last."""
    measures = next(iter(record["result"]["measures"].values()))
    pair = (measures["error %"], measures["NLL"])
    return pair if np.isfinite(pair).all() else (np.inf, np.inf)


def table(records):
    """The table of final runs, one row for each way to predict of each method.

    Args:
        records: Sequence of records of phase `"final"`, of one column, with the same seeds for every method.

    Returns:
        A `rich.table.Table`.
    """
    job = records[0]["job"]
    seeds = len({record["job"]["seed"] for record in records})
    chosen = {record["job"]["method"]: record["job"]["settings"] for record in records}
    title = f"{job['column']}, protocol {job['protocol']}, {job['iterations']} iterations, {seeds} seeds: test error in percent"
    caption = "difference: mean of the paired differences to base, with its 95 % confidence interval"
    result = Table(title=title, caption=caption, box=MARKDOWN)
    for name in (
        "method",
        "predicted by",
        "median",
        "mean +- sd",
        "NLL",
        "ECE %",
        "difference",
        "ms/step",
        "settings",
        "paper",
    ):
        result.add_column(name)
    values = {}
    for record in records:
        for row, measures in record["result"]["measures"].items():
            for name, value in measures.items():
                values.setdefault((record["job"]["method"], row), {}).setdefault(name, []).append(value)
    base = values.get(("base", "(2)"))
    for (method, row), measures in values.items():
        errors = np.array(measures["error %"])
        times = [r["result"]["seconds"] / r["result"]["steps"] for r in records if r["job"]["method"] == method]
        result.add_row(
            method,
            row,
            f"{np.median(errors):.2f}",
            f"{errors.mean():.2f} +- {errors.std(ddof=1) if seeds > 1 else np.nan:.2f}",
            f"{np.mean(measures['NLL']):.3f}",
            f"{np.mean(measures['ECE %']):.2f}",
            _difference(errors, base) if base and method != "base" else "",
            f"{1000 * np.median(times):.1f}",
            ", ".join(f"{name} {value:g}" for name, value in chosen[method].items()),
            str(PAPER.get(job["column"], {}).get((method, row), "")),
        )
    return result


def _difference(errors, base):
    differences = errors - np.array(base["error %"])
    if len(differences) < 2:
        return f"{differences.mean():+.2f}"
    half = stats.sem(differences) * stats.t.ppf(0.975, len(differences) - 1)
    return f"{differences.mean():+.2f} [{differences.mean() - half:+.2f}, {differences.mean() + half:+.2f}]"
