"""The command line: `python -m tf_dropmax.experiments COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tf_dropmax.experiments import convergence, demo, speed, table1
from tf_dropmax.experiments.errors import UserError
from tf_dropmax.experiments.systems import GROUPS
from tf_dropmax.experiments.train import COLUMNS, PROTOCOLS


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
    _add_demo(commands)
    _add_table1(commands)
    _add_convergence(commands)
    _add_speed(commands)
    options = vars(parser.parse_args(arguments))
    del options["command"]
    run: Callable[..., Any] = options.pop("run")
    tf.get_logger().setLevel("ERROR")  # The experiments trace many models on purpose.
    try:
        run(**options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _add_demo(commands):
    command = commands.add_parser(
        "demo", help="train a small network with a softmax and with DropMax, and compare them"
    )
    command.set_defaults(run=demo.run)
    _add(command, "--dataset", "data set", "digits", choices=list(demo.TRAIN_PER_CLASS))
    _add(command, "--seeds", "runs of each network", 5, type=_positive)
    _add(command, "--epochs", "epochs of each run", 200, type=_positive)
    _add(command, "--output", "folder for the results", "dropmax-demo")


def _add_table1(commands):
    command = commands.add_parser("table1", help="measure a column of Table 1 of the paper")
    command.set_defaults(run=table1.run)
    command.add_argument("--column", required=True, choices=COLUMNS, help="column of the table")
    _add(command, "--protocol", "network and schedule", "released", choices=PROTOCOLS)
    methods = (
        "names of systems or of groups; "
        + "; ".join(f"{group}: {', '.join(names)}" for group, names in GROUPS.items())
        + " (default: paper)"
    )
    command.add_argument("--methods", nargs="+", metavar="METHOD", default=["paper"], help=methods)
    _add(command, "--seeds", "final runs of each method", 5, type=_positive)
    command.add_argument(
        "--iterations", type=_positive, help="training steps of a run (default: the protocol's)"
    )
    _add(command, "--workers", "processes", 2, type=_positive)
    _add(command, "--budget", "settings that are tried for each method", 6, type=_positive)
    command.add_argument(
        "--weights",
        help=".weights.h5 file from which the network starts (default: random weights)",
    )
    command.add_argument(
        "--output",
        help="results file, to which new results are added (default: table1-COLUMN-PROTOCOL.jsonl)",
    )


def _add_convergence(commands):
    command = commands.add_parser(
        "convergence", help="repeat the final runs of table1 and measure during training"
    )
    command.set_defaults(run=convergence.run)
    command.add_argument("results", help="results file of table1")
    command.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="names of systems (default: all)"
    )
    _add(command, "--seeds", "runs of each method", 5, type=_positive)
    _add(command, "--workers", "processes", 2, type=_positive)
    command.add_argument(
        "--output",
        help="results file, to which new results are added (default: RESULTS-convergence.jsonl)",
    )


def _add_speed(commands):
    command = commands.add_parser(
        "speed", help="measure the time and memory of the head as ratios to baselines"
    )
    command.set_defaults(run=speed.run)
    command.add_argument(
        "--parts",
        nargs="+",
        choices=speed.PARTS,
        default=speed.PARTS,
        help="measurements (default: all)",
    )
    command.add_argument(
        "--classes",
        nargs="+",
        type=_positive,
        default=speed.CLASSES,
        metavar="T",
        help="numbers of classes (default: " + " ".join(map(str, speed.CLASSES)) + ")",
    )
    command.add_argument(
        "--policies",
        nargs="+",
        metavar="POLICY",
        help="dtype policies (default: float32 and mixed ones)",
    )
    _add(command, "--repeats", "turns, of which the median is reported", 9, type=_positive)
    _add(command, "--output", "folder for the results", "dropmax-speed")


def _add(command, name, help_text, default, **options):
    """Adds an option whose help shows the default."""
    text = f"{help_text} (default: %(default)s)"
    command.add_argument(name, default=default, help=text, **options)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, received {text}")
    return value
