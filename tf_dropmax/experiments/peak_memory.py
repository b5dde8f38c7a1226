"""Peak memory of a training step, each in a new process."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import tensorflow as tf

from tf_dropmax.experiments.errors import UserError
from tf_dropmax.experiments.speed_heads import BATCH, training_steps
from tf_dropmax.experiments.timing import seconds_per_call


def peak(
    classes: int, name: str, compiled: bool = False, batch: int = BATCH
) -> tuple[float, float]:
    """Peak memory and time of a training step.

    Args:
        classes: Positive int, T.
        name: A key of `heads_and_losses`.
        compiled: Bool, whether XLA compiles the step. Defaults to `False`.
        batch: Positive int, number of examples. Defaults to `BATCH`.

    Returns:
        The memory in MiB, without that of TensorFlow itself, and the time in seconds.

    Raises:
        UserError: If the process fails, for example because memory is short.
    """
    code = (
        "from tf_dropmax.experiments import peak_memory; "
        f"peak_memory.print_peak({classes}, {name!r}, {compiled}, {batch})"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = result.stderr[-500:]
        raise UserError(f"The measurement of {name} with {classes} classes failed: {reason}")
    memory, seconds = json.loads(result.stdout.splitlines()[-1])
    return memory, seconds


def print_peak(classes: int, name: str, compiled: bool, batch: int) -> None:
    """Runs in the new process: prints the result of `peak` as JSON."""
    small = training_steps(10, compiled=compiled, names=[name])[name]
    small()  # Allocates the memory that TensorFlow needs for any head.
    before = _peak_so_far()
    step = training_steps(classes, compiled=compiled, names=[name], batch=batch)[name]
    seconds = [seconds_per_call(step) for _ in range(4)]
    print(json.dumps([_peak_so_far() - before, statistics.median(seconds[1:])]))


def _peak_so_far():
    """In MiB, of the GPU, or of this process if there is no GPU."""
    if tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20
    # `resource.getrusage` would include the memory of the parent process before the fork.
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
