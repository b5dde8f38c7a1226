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
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import tensorflow as tf
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tf_dropmax.experiments.errors import UserError, writing

Job = dict[str, Any]
Result = dict[str, Any]
Record = dict[str, Any]
Executed = tuple[Job, Callable[[], Result]]


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
    if path.exists():
        lines = path.read_text().split("\n")
        for number, line in enumerate(lines[:-1], 1):
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
    packages = ("tf_dropmax", "tensorflow", "keras", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "commit": _commit(),
        "device": device(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }


def _commit() -> str | None:
    """The commit of this checkout, with a `+` if files have changed. `None` without a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit, changes = (
            subprocess.check_output([*git, *command.split()], stderr=subprocess.DEVNULL, text=True)
            for command in ("rev-parse --short HEAD", "status --porcelain -- ..")
        )
        return commit.strip() + ("+" if changes.strip() else "")
    return None


def device() -> str:
    """The names of the GPUs, or of the processor if there is no GPU."""
    names = [
        tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    return ", ".join(names) or _processor()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
            raised an exception, or killed its process and killed it again when it ran alone.
    """
    path = Path(path)
    records = read(path)
    pending = [job for job in jobs if key(job) not in records]
    failures = []
    if pending:
        with (
            _opened(path) as file,
            _progress(console) as progress,
            contextlib.closing(_executed(execute, pending, workers)) as executed,
        ):
            _cut_broken_line(file)
            completed = len(jobs) - len(pending)
            task = progress.add_task(path.stem, total=len(jobs), completed=completed)
            for job, get in executed:
                try:
                    record = {"job": job, "result": get(), "environment": environment()}
                except Exception as error:
                    failures.append(f"{key(job)}: {error!r}")
                    continue
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                records[key(job)] = record
                progress.advance(task)
    if failures:
        raise UserError(
            f"{len(failures)} of {len(jobs)} jobs failed. The results of the others are in {path}. "
            + "; ".join(failures)
        )
    return [records[key(job)] for job in jobs]


def _opened(path: Path) -> BinaryIO:
    with writing(f"The results file {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+b")


def _progress(console: Console | None) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Jobs take minutes, so the remaining time is estimated from all jobs, not from 30 seconds.
    return Progress(*columns, console=console, speed_estimate_period=1e6)


def _executed(
    execute: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Generator[Executed, None, None]:
    """Yields every finished job with a function that returns its result or raises its error."""
    if workers == 1:
        for job in jobs:
            yield job, functools.partial(execute, job)
        return
    alone = []
    while jobs:
        broken = yield from _in_pool(execute, jobs, workers)
        # Jobs start in order. One of the first `workers` of these jobs has killed the process, for
        # example because memory was short. Running them alone shows which one.
        alone += broken[:workers]
        jobs = [job for job, _ in broken[workers:]]
    for job, _ in alone:
        broken = yield from _in_pool(execute, [job], workers)
        yield from ((job, future.result) for job, future in broken)


def _in_pool(
    execute: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Generator[Executed, None, list[tuple[Job, Future]]]:
    """Yields as `_executed`. Returns the jobs whose process was killed, in order."""

    def killed(future):
        return isinstance(future.exception(), BrokenProcessPool)

    with _pool(workers) as pool, _ended_by_exceptions(pool):
        futures = {pool.submit(execute, job): job for job in jobs}
        for future in as_completed(futures):
            if not killed(future):
                yield futures[future], future.result
    return [(job, future) for future, job in futures.items() if killed(future)]


@contextlib.contextmanager
def _ended_by_exceptions(pool: ProcessPoolExecutor) -> Iterator[None]:
    """After an exception, such as Ctrl-C, the workers end at once and not after all their jobs."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def _pool(workers: int) -> ProcessPoolExecutor:
    threads = str(max((os.cpu_count() or 1) // workers, 1))
    for variable in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ[variable] = threads
    # Otherwise the first worker takes all memory of a GPU.
    os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Ends a worker when the program that started it is killed. It would not notice by itself."""

    def wait():
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _cut_broken_line(file: BinaryIO) -> None:
    """Removes a last line that is incomplete because the writing process was killed."""
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
