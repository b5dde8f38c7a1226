"""Command line: `python -m tf_dropmax.experiments COMMAND`."""

import argparse
import sys

import tensorflow as tf

from tf_dropmax.experiments.errors import UserError


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tf_dropmax.experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small network with softmax and with DropMax, and compare")
    demo.add_argument("--dataset", choices=["digits", "mnist"], default="digits", help="default: %(default)s")
    demo.add_argument("--seeds", type=_positive, default=5, help="runs of either network, default: %(default)s")
    demo.add_argument("--epochs", type=_positive, default=200, help="default: %(default)s")
    demo.add_argument("--output", default="dropmax-demo", help="folder for the results, default: %(default)s")
    options = vars(parser.parse_args(arguments))
    options.pop("command")

    tf.get_logger().setLevel("ERROR")  # many models are traced here, by design
    try:
        from tf_dropmax.experiments import demo

        demo.run(**options)
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
