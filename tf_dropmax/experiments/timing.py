"""Times of functions as ratios to a baseline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf


def paired(
    functions: Mapping[str, Callable[[], Any]], repeats: int = 15, least: float = 0.05
) -> dict[str, dict[str, float]]:
    """Times functions in turns, so that all of them meet the same state of the machine.

    Args:
        functions: Dictionary of functions without arguments. The first is the baseline.
        repeats: Positive int, number of turns. Defaults to 15.
        least: Positive float, the shortest time in seconds that a function takes in a turn. A fast
            function is called several times. Defaults to 0.05.

    Returns:
        `{name: {"ms": median time of a call in milliseconds, "ratio": median ratio to the time of
        the baseline in the same turn}}`.
    """
    calls = {}
    for name, function in functions.items():
        seconds_per_call(function)  # Traces a `tf.function`.
        calls[name] = max(1, round(least / seconds_per_call(function)))
    turns = [
        {name: seconds_per_call(function, calls[name]) for name, function in functions.items()}
        for _ in range(repeats)
    ]
    baseline = next(iter(functions))
    return {
        name: {
            "ms": 1000 * statistics.median(turn[name] for turn in turns),
            "ratio": statistics.median(turn[name] / turn[baseline] for turn in turns),
        }
        for name in functions
    }


def seconds_per_call(function: Callable[[], Any], count: int = 1) -> float:
    """Mean time of `count` calls in seconds."""
    start = time.perf_counter()
    for _ in range(count):
        result = function()
    for value in tf.nest.flatten(result):
        np.asarray(value)  # Waits for an accelerator, which computes on after the call.
    return (time.perf_counter() - start) / count
