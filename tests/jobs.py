"""Jobs for the runner's tests, in a module that worker processes import quickly."""

import os
import signal
import time


def square(job):
    if job["x"] == "broken":
        raise RuntimeError("cannot be squared")
    return {"y": job["x"] ** 2, "process": os.getpid()}


def deadly(job):
    if job["x"] in (0, 5):
        os.kill(os.getpid(), signal.SIGKILL)
    return square(job)


def slow(job):
    time.sleep(0.1 if job["x"] < 3 else 1.0)  # soon some results, then time to kill
    return {"y": job["x"], "process": os.getpid()}
