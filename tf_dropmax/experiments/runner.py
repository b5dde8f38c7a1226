"""Runs many jobs in worker processes.

Every result is written to a JSON-lines file as soon as it is there. A run that was killed continues
from this file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import platform
import re
import subprocess
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tensorflow as tf
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from tf_dropmax.experiments.console import UserError, writing

Job = dict[str, Any]
Result = dict[str, Any]
Record = dict[str, Any]


def key(job: Job) -> str:
    """The string that identifies a job."""
    return json.dumps(job, sort_keys=True)


def read(path: Path | str) -> dict[str, Record]:
    """The records of a results file.

    Args:
        path: Path of the file, which need not exist.

    Returns:
        The records by the key of their job. A last line without its end is ignored.

    Raises:
        UserError: If another line is not a record.
    """
    path = Path(path)
    records = {}
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records[key(record["job"])] = record
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}, is not a result of this program ({error})."
            ) from error
    return records


@functools.cache
def environment() -> dict[str, Any]:
    """The versions and the device, which are stored with every result."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("tf_dropmax", "tensorflow", "keras", "numpy")},
        "commit": _commit(),
        "device": device(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }


def _commit() -> str | None:
    """The commit of this checkout, with `-dirty` if files have changed. `None` without one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    return None


def device() -> str:
    """The names of the GPUs, or of the processor if there is no GPU."""
    names = [
        tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    path = Path("/proc/cpuinfo")
    processor = re.search(r"model name\s*: (.+)", path.read_text() if path.exists() else "")
    return ", ".join(names) or (processor[1] if processor else platform.processor())


def run(
    execute: Callable[[Job], Result],
    jobs: Sequence[Job],
    path: Path | str,
    workers: int = 2,
    console: Console | None = None,
) -> list[Record]:
    """Executes the jobs that have no result yet.

    Args:
        execute: Function from a job to a dictionary of JSON values. It must be picklable.
        jobs: Sequence of dictionaries of JSON values.
        path: Path of the results file. Each result is appended as a record
            `{"job": ..., "result": ..., "environment": ...}`.
        workers: Positive int, number of processes. Each uses its share of the processor's cores.
            1 runs the jobs in this process. Defaults to 2.
        console: A `rich.console.Console` for the progress display, or `None`. Defaults to `None`.

    Returns:
        The records of all jobs, in the order of `jobs`.

    Raises:
        UserError: If the file cannot be read or written. After all other jobs have run: if a job
            raised an exception. If a job kills its process, for example because memory is short,
            the jobs that have not finished fail too. The next run repeats them.
    """
    path = Path(path)
    records = read(path)
    pending = [job for job in jobs if key(job) not in records]
    failures = []
    with writing(f"The results file {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    # Jobs take minutes, so the remaining time is estimated from all jobs, not from 30 seconds.
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    progress = Progress(*columns, console=console, speed_estimate_period=1e6)
    results = _results(execute, pending, workers)
    with file, progress, contextlib.closing(results):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # A kill may have left half a line.
        done = len(jobs) - len(pending)
        task = progress.add_task(path.stem, total=len(jobs), completed=done)
        for job, result in results:
            try:
                record = {"job": job, "result": result(), "environment": environment()}
            except Exception as error:
                failures.append(f"{key(job)}: {error!r}")
                continue
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            records[key(job)] = record
            progress.advance(task)
    if failures:
        raise UserError(
            f"{len(failures)} of {len(jobs)} jobs failed. The results of the others are in {path}. "
            + "; ".join(failures)
        )
    return [records[key(job)] for job in jobs]


def _results(
    execute: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Generator[tuple[Job, Callable[[], Result]], None, None]:
    """Yields every finished job with a function that returns its result or raises its error."""
    if workers == 1 or not jobs:
        yield from ((job, functools.partial(execute, job)) for job in jobs)
        return
    threads = str(max((os.cpu_count() or 1) // workers, 1))
    for variable in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ[variable] = threads
    # Otherwise the first worker takes all memory of a GPU.
    os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
    try:
        futures = {pool.submit(execute, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends a worker when the program that started it is killed. It would not notice by itself."""

    def wait(parent):
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, args=[multiprocessing.parent_process()], daemon=True).start()
