"""The command line: `python -m tf_dropmax.experiments COMMAND`.

TensorFlow writes start-up messages unless the environment variable `TF_CPP_MIN_LOG_LEVEL` is 3.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import tensorflow as tf

from tf_dropmax.experiments import comparisons, demo, reports, speed, train
from tf_dropmax.experiments.console import UserError
from tf_dropmax.experiments.systems import GROUPS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Sequence of strings. `None` is `sys.argv`. Defaults to `None`.

    Returns:
        The exit status, 0 or 1.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tf_dropmax.experiments", description="Experiments with DropMax."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for run, name, text, add_options in (
        (demo.run, "demo", "compare a softmax and DropMax quickly", _demo),
        (comparisons.table1, "table1", "measure a column of Table 1 of the paper", _table1),
        (comparisons.untuned, "untuned", "compare heads that nobody tuned on many tasks", _untuned),
        (reports.read, "report", "print the tables of results files", _report),
        (speed.run, "speed", "measure the time and the memory of the head", _speed),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        add_options(partial(_add, command))
    options = vars(parser.parse_args(arguments))
    del options["command"]
    tf.get_logger().setLevel("ERROR")  # The experiments trace many models on purpose.
    try:
        options.pop("run")(**options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _add(command, option, text, default=None, **options):
    """Adds an option whose help shows the default."""
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    text += "" if default is None else f" (default: {shown})"
    command.add_argument(option, help=text, default=default, **options)


def _demo(add):
    add("--dataset", "data set", "digits", choices=list(demo.TRAIN_PER_CLASS))
    add("--seeds", "runs of each network", 5, type=_positive)
    add("--epochs", "epochs of each run", 200, type=_positive)
    add("--output", "folder for the results", "dropmax-demo")


def _methods(add, default):
    groups = "; ".join(f"{group}: {', '.join(names)}" for group, names in GROUPS.items())
    text = f"names of methods or of groups; {groups}"
    add("--methods", text, default, nargs="+", metavar="METHOD")


def _table1(add):
    add("--column", "column of the table", required=True, choices=train.COLUMNS)
    add("--protocol", "network and schedule", "released", choices=train.PROTOCOLS)
    _methods(add, ("paper",))
    add("--seeds", "final runs of each method", 5, type=_positive)
    add("--iterations", "training steps of a run (default: the protocol's)", type=_positive)
    add("--workers", "processes", 2, type=_positive)
    add("--budget", "settings that are tried for each method", 6, type=_positive)
    add("--curves", "measure during training and draw Figure 3", False, action="store_true")
    text = "results file, to which new results are added"
    add("--output", f"{text} (default: table1-COLUMN-PROTOCOL.jsonl)")


def _untuned(add):
    tasks = tuple(comparisons.TASKS)
    add("--tasks", "names of tasks", tasks, nargs="+", choices=tasks, metavar="TASK")
    _methods(add, ("untuned",))
    add("--seeds", "runs of each method (default: the task's, 3 or 5)", type=_positive)
    add("--workers", "processes", 2, type=_positive)
    add("--output", "results file, to which new results are added", "untuned.jsonl")


def _report(add):
    add("files", "results files of table1 or untuned", nargs="+", metavar="FILE")
    add("--picture", "file for a picture of the curves, as in Figure 3")


def _speed(add):
    add("--parts", "measurements", speed.PARTS, nargs="+", choices=speed.PARTS)
    add("--classes", "numbers of classes", speed.CLASSES, nargs="+", type=_positive, metavar="T")
    add("--policies", "dtype policies", speed.POLICIES, nargs="+", metavar="POLICY")
    add("--repeats", "turns, of which the median is reported", 9, type=_positive)
    add("--batch", "examples for the part memory", speed.BATCH, type=_positive)
    add("--output", "file for the results", "speed.json")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, received {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
