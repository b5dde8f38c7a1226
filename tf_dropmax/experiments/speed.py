"""What the head costs: times and memory as ratios to baselines, all measured in one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow as tf
from matplotlib.figure import Figure
from rich.box import MARKDOWN
from rich.table import Table

from tf_dropmax.experiments import runner, speed_parts
from tf_dropmax.experiments.console import wide_console
from tf_dropmax.experiments.errors import UserError, writing

PARTS = ("head", "compilation", "network", "systems", "predict", "memory", "growth")
CLASSES = (10, 100, 1000, 10_000, 50_000)


def run(
    parts: Sequence[str] = PARTS,
    classes: Sequence[int] = CLASSES,
    policies: Sequence[str] | None = None,
    repeats: int = 9,
    output: Path | str = "dropmax-speed",
) -> dict[str, Any]:
    """Measures, prints tables, and writes the numbers and a picture of the part `"growth"`.

    Args:
        parts: Sequence of names in `PARTS`; see the functions of `speed_parts`. Defaults to all.
        classes: Sequence of positive ints, numbers of classes T for `"head"`. `"memory"` takes the
            largest. Defaults to `CLASSES`.
        policies: Sequence of dtype policies for `"head"`. `None` is float32 and mixed_bfloat16 and,
            on a GPU, mixed_float16. Defaults to `None`.
        repeats: Positive int, number of turns, of which the median is reported. Defaults to 9.
        output: Path of the folder for the results. Defaults to `"dropmax-speed"`.

    Returns:
        `{"environment": versions and device, part: [rows]}`, also with the parts that the folder
        contained before. The rows are those of `speed_parts`.

    Raises:
        UserError: If the folder cannot be written, or contains measurements of another device or
            version.
    """
    console = wide_console(160)
    numbers = Path(output) / "speed.json"
    results = _earlier_results(numbers)
    if results.setdefault("environment", runner.environment()) != runner.environment():
        raise UserError(
            f"{output} contains measurements of another device or version. Choose another folder."
        )
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    mixed = ("mixed_float16", "mixed_bfloat16") if on_gpu else ("mixed_bfloat16",)
    measure: dict[str, Callable[[], speed_parts.Rows]] = {
        "head": partial(speed_parts.head, classes, policies or ("float32", *mixed), repeats),
        "compilation": partial(speed_parts.compilation, repeats=repeats),
        "network": partial(speed_parts.network, repeats),
        "systems": partial(speed_parts.systems, repeats),
        "predict": partial(speed_parts.predict, repeats),
        "memory": partial(speed_parts.memory, max(classes)),
        "growth": speed_parts.growth,
    }
    for part in parts:
        results[part] = []
        for row in measure[part]():
            console.print(_line(row))
            results[part].append(row)
            numbers.write_text(json.dumps(results, indent=1))
        console.print(_table(part, results[part]))
    if "growth" in parts:
        _picture(results["growth"]).savefig(numbers.with_name("growth.png"), dpi=150)
    console.print(f"numbers: {numbers}", soft_wrap=True)
    return results


def _earlier_results(path: Path) -> dict[str, Any]:
    """The contents of a results file, which is created if there is none."""
    with writing(f"The output folder {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        text = path.read_text()
    try:
        return json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"{path} is not a result of this program ({error}).") from error


def _line(row):
    cells = []
    for name, value in row.items():
        if isinstance(value, dict):
            numbers = (f"{number:.3g} {unit}" for unit, number in value.items())
            cells.append(f"{name} {' '.join(numbers)}")
    return f"{row['what']}: {', '.join(cells) or format(row['error'], '.1e')}"


def _table(part, rows):
    contenders = dict.fromkeys(
        name for row in rows for name, value in row.items() if isinstance(value, dict)
    )
    table = Table(title=f"{part}: ratios to the first", box=MARKDOWN)
    for name in ("", *contenders):
        table.add_column(name)
    for row in rows:
        if "error" not in row:
            table.add_row(row["what"], *(_cell(row.get(name)) for name in contenders))
    return table


def _cell(value):
    if value is None:
        return ""
    numbers = (f"{value[unit]:.3g} {unit}" for unit in ("ms", "MiB") if unit in value)
    ratio = f"{value['ratio']:.2f} " if "ratio" in value else ""
    goal = f", goal {value['goal']:g}" if "goal" in value else ""
    return f"{ratio}({', '.join(numbers)}{goal})"


def _picture(rows):
    """Time and memory against the number of classes."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = (
        ("ms", "time of a training step", 1000, "seconds"),
        ("MiB", "peak memory", 1024, "GiB"),
    )
    for axes, (key, title, factor, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, style in (("Dense(2T)", "k--o"), ("DropMax", "k-s")):
            x = [row["classes"] / 1000 for row in rows]
            y = [row[name][key] / factor for row in rows]
            axes.plot(x, y, style, label=name, markersize=5)
        axes.set(xlabel="number of classes T, in thousands", ylabel=unit, title=title)
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.legend(frameon=False)
    return figure
