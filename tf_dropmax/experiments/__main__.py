"""Command line: `python -m tf_dropmax.experiments COMMAND`."""

import argparse
import sys

import tensorflow as tf

from tf_dropmax.experiments import convergence, demo, speed, table1
from tf_dropmax.experiments.errors import UserError
from tf_dropmax.experiments.systems import GROUPS
from tf_dropmax.experiments.train import COLUMNS, PROTOCOLS


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tf_dropmax.experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    options = commands.add_parser("demo", help="train a small network with softmax and with DropMax, and compare")
    options.add_argument("--dataset", choices=["digits", "mnist"], default="digits", help="default: %(default)s")
    options.add_argument("--seeds", type=_positive, default=5, help="runs of either network, default: %(default)s")
    options.add_argument("--epochs", type=_positive, default=200, help="default: %(default)s")
    options.add_argument("--output", default="dropmax-demo", help="folder for the results, default: %(default)s")
    options = commands.add_parser("table1", help="measure a column of the paper's Table 1")
    options.add_argument("--column", required=True, choices=COLUMNS)
    options.add_argument("--protocol", choices=PROTOCOLS, default="released", help="default: %(default)s")
    systems = "the paper's; or DropMax with parts of its objective switched off; or other ways to a better softmax"
    options.add_argument("--systems", choices=GROUPS, default="paper", help=f"{systems}; default: %(default)s")
    methods = "; ".join(f"{group}: {', '.join(names)}" for group, names in GROUPS.items())
    options.add_argument("--methods", nargs="+", metavar="METHOD", help=f"{methods}; default: all")
    options.add_argument("--seeds", type=_positive, default=5, help="final runs of each method, default: %(default)s")
    options.add_argument("--iterations", type=_positive, help="training steps of a run, default: as in the protocol")
    options.add_argument("--workers", type=_positive, default=2, help="processes, default: %(default)s")
    options.add_argument("--budget", type=_positive, default=6, help="settings tried for each method, default: %(default)s")
    options.add_argument("--weights", help=".weights.h5 file that the network starts from, default: random weights")
    options.add_argument("--output", help="results file, which is added to, default: table1-COLUMN-PROTOCOL.jsonl")
    options = commands.add_parser("convergence", help="train again what table1 chose, and measure in the course of training")
    options.add_argument("results", help="results file of table1")
    options.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all in the file")
    options.add_argument("--seeds", type=_positive, default=5, help="runs of each method, default: %(default)s")
    options.add_argument("--workers", type=_positive, default=2, help="processes, default: %(default)s")
    options.add_argument("--output", help="results file, which is added to, default: RESULTS-convergence.jsonl")
    options = commands.add_parser("speed", help="measure what the head costs, as ratios to baselines")
    options.add_argument("--parts", nargs="+", choices=speed.PARTS, default=speed.PARTS, help="default: all")
    options.add_argument("--classes", nargs="+", type=_positive, default=(10, 100, 1000, 10_000, 50_000), metavar="T")
    options.add_argument("--policies", nargs="+", metavar="POLICY", help="dtype policies, default: float32 and mixed ones")
    options.add_argument("--repeats", type=_positive, default=9, help="turns, default: %(default)s")
    options.add_argument("--output", default="dropmax-speed", help="folder for the results, default: %(default)s")
    options = vars(parser.parse_args(arguments))
    runs = {"demo": demo.run, "table1": table1.run, "convergence": convergence.run, "speed": speed.run}
    command = runs[options.pop("command")]

    tf.get_logger().setLevel("ERROR")  # many models are traced here, by design
    try:
        command(**options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, received {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
