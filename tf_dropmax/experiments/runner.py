"""Runs many jobs, in worker processes; results go to a JSON-lines file at once, and a killed run goes on from there."""

import contextlib
import functools
import json
import multiprocessing
import os
import platform
import subprocess
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path

import tensorflow as tf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tf_dropmax.experiments.errors import UserError


def key(job):
    """What identifies a job, a dictionary of JSON values."""
    return json.dumps(job, sort_keys=True)


def read(path):
    """The records of a results file, by the key of their job; a last line that was cut short is left out."""
    path = Path(path)
    records = {}
    if path.exists():
        lines = path.read_text().split("\n")
        for number, line in enumerate(lines[:-1], 1):
            try:
                record = json.loads(line)
                records[key(record["job"])] = record
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}, is not a result of this program ({error}).") from error
    return records


@functools.cache
def environment():
    """Versions and device, which are stored with every result."""
    packages = ("tf_dropmax", "tensorflow", "keras", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "commit": _commit(),
        "device": device(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }


def _commit():
    """Of the checkout that this file is in, with a `+` if it has been changed since; `None` if it is in none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit, changes = (
            subprocess.run([*git, *command.split()], check=True, capture_output=True, text=True).stdout.strip()
            for command in ("rev-parse --short HEAD", "status --porcelain -- ..")
        )
        return commit + ("+" if changes else "")
    return None


def device():
    """Names of the GPUs, or else of the processor."""
    gpus = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus]
    return ", ".join(names) or _processor()


def _processor():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def run(execute, jobs, path, workers=2, console=None):
    """Executes the jobs that have no result yet.

    Args:
        execute: A function that can be pickled, from a job to a dictionary of JSON values.
        jobs: Sequence of dictionaries of JSON values.
        path: Path of the results file; each result is appended as soon as there is one, as
            `{"job": ..., "result": ..., "environment": ...}`.
        workers: Positive int, number of processes; each computes with its share of the processor's cores. With 1, jobs run in
            this process. Defaults to 2.
        console: A `rich.console.Console` for the progress display, or `None`. Defaults to `None`.

    Returns:
        The records of all the jobs, in their order.

    Raises:
        UserError: if the file cannot be read or written; if a job failed, or its process was killed, and again when it was
            alone, after all others have run.
    """
    path = Path(path)
    records = read(path)
    pending = [job for job in jobs if key(job) not in records]
    failures = []
    if pending:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        except OSError as error:
            raise UserError(f"The results file {path} cannot be written ({error.strerror or error}).") from error
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        # Jobs take minutes: the time left is estimated from all of them, and not from the last half-minute.
        progress = Progress(*columns, console=console, speed_estimate_period=1e6)
        with file, progress, contextlib.closing(_executed(execute, pending, workers)) as executed:
            _cut_broken_line(file)
            task = progress.add_task(path.stem, total=len(jobs), completed=len(jobs) - len(pending))
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
        raise UserError(f"{len(failures)} of {len(jobs)} jobs failed; the others are in {path}. " + "; ".join(failures))
    return [records[key(job)] for job in jobs]


def _executed(execute, jobs, workers):
    """Yields every job, when it is done or has failed, with a function that returns its result or raises its exception."""
    if workers == 1:
        for job in jobs:
            yield job, functools.partial(execute, job)
        return
    alone = []
    while jobs:
        broken = yield from _in_pool(execute, jobs, workers)
        # Jobs begin in their order: the first of these were running when a process was killed, e.g. for want of memory, one
        # of them being the cause; which one shows when they are alone.
        alone += broken[:workers]
        jobs = [job for job, _ in broken[workers:]]
    for job, _ in alone:
        yield from [(job, future.result) for job, future in (yield from _in_pool(execute, [job], workers))]


def _in_pool(execute, jobs, workers):
    """Yields as `_executed`; returns the jobs that did not finish as a process was killed, with their futures, in order."""
    with _pool(workers) as pool, _ended_by_exceptions(pool):
        futures = {pool.submit(execute, job): job for job in jobs}
        for future in as_completed(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                yield futures[future], future.result
    return [(job, future) for future, job in futures.items() if isinstance(future.exception(), BrokenProcessPool)]


@contextlib.contextmanager
def _ended_by_exceptions(pool):
    """On Ctrl-C or when a result cannot be written, ends the workers at once, rather than after all their jobs."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def _pool(workers):
    threads = str(max((os.cpu_count() or 1) // workers, 1))
    os.environ.update(OMP_NUM_THREADS=threads, TF_NUM_INTRAOP_THREADS=threads, TF_NUM_INTEROP_THREADS=threads)
    os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"  # else the first worker takes the whole memory of a GPU
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent():
    """In a worker: ends it when the program that started it was killed, which a worker would not notice by itself."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _cut_broken_line(file):
    """Takes away what a kill in the midst of writing left after the last whole line."""
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
