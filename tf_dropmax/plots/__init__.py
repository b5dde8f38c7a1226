"""Figures of training, predictions and retain probabilities.

Install what they need with `pip install 'tf_dropmax[plots]'`.

The functions take arrays and return matplotlib figures or axes. They do not show or save anything.
Call `figure.savefig(path)`, or `axes.figure.savefig(path)`.

In heat maps, zero is white, and larger values are darker. Lines differ in dashes and markers as
well as in colour. Every figure can be read in black-and-white print.

Equations and figures are numbered as in *DropMax: Adaptive Stochastic Softmax* (version 1 of
arXiv:1712.07834).
"""

from importlib.util import find_spec

if find_spec("matplotlib") is None or find_spec("scipy") is None:
    raise ImportError(
        "tf_dropmax.plots needs matplotlib and scipy: pip install 'tf_dropmax[plots]'"
    )

from tf_dropmax.plots.classes import class_averages, confusion, top_and_bottom
from tf_dropmax.plots.instances import easy_and_hard, examples
from tf_dropmax.plots.planes import contours, decision_boundaries
from tf_dropmax.plots.reliability import reliability_diagram
from tf_dropmax.plots.training import convergence

__all__ = [
    "class_averages",
    "confusion",
    "contours",
    "convergence",
    "decision_boundaries",
    "easy_and_hard",
    "examples",
    "reliability_diagram",
    "top_and_bottom",
]
