"""Jobs for the tests of the runner. Worker processes import this module quickly."""

import os
import signal
import time


def square(job):
    if job["x"] == "broken":
        raise RuntimeError("cannot be squared")
    if job["x"] == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"y": job["x"] ** 2, "process": os.getpid()}


def slow(job):
    time.sleep(0.1 if job["x"] < 3 else 1.0)  # Some results come soon. Then there is time to kill.
    return {"y": job["x"], "process": os.getpid()}
