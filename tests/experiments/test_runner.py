"""The runner: worker processes, failures, kills, and results files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest
import tensorflow as tf

from tf_dropmax.experiments import runner
from tf_dropmax.experiments.console import UserError


def lines(path):
    return path.read_bytes().split(b"\n")[:-1]


def running(process):
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_have_the_order_of_the_jobs_and_are_not_repeated(tmp_path):
    path = tmp_path / "below" / "results.jsonl"
    records = runner.run(jobs.square, [{"x": x} for x in (3, 1, 2)], path)
    assert [record["result"]["y"] for record in records] == [9, 1, 4]
    assert all(record["result"]["process"] != os.getpid() for record in records)
    assert records[0]["environment"]["tensorflow"]
    before = path.read_bytes()
    records = runner.run(jobs.square, [{"x": x} for x in (2, 5, 3)], path, workers=1)
    assert [record["result"]["y"] for record in records] == [4, 25, 9]
    assert path.read_bytes().startswith(before)
    assert len(lines(path)) == 4


def test_results_name_the_device(monkeypatch):
    assert runner.environment()["device"] == runner.device() != ""
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", {"GPU": [gpu]}.__getitem__)
    monkeypatch.setattr(
        tf.config.experimental,
        "get_device_details",
        {gpu: {"device_name": "a fast one"}}.__getitem__,
    )
    assert runner.device() == "a fast one"


def test_a_failing_job_does_not_stop_the_others(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(UserError, match=r"1 of 3 jobs failed.*cannot be squared"):
        runner.run(jobs.square, [{"x": 1}, {"x": "broken"}, {"x": 2}], path)
    assert {record["result"]["y"] for record in runner.read(path).values()} == {1, 4}


@pytest.mark.long
def test_a_job_that_kills_its_process_is_an_error_and_the_next_run_continues(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(UserError, match=r"jobs failed.*BrokenProcessPool"):
        runner.run(jobs.square, [{"x": x} for x in (1, 2, "deadly", 3)], path)
    records = runner.run(jobs.square, [{"x": x} for x in (1, 2, 3)], path)
    assert [record["result"]["y"] for record in records] == [1, 4, 9]


def test_incomplete_lines_are_repeated_and_other_files_raise(tmp_path):
    path = tmp_path / "results.jsonl"
    runner.run(jobs.square, [{"x": 1}, {"x": 2}], path, workers=1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert len(runner.read(path)) == 1
    runner.run(jobs.square, [{"x": 1}, {"x": 2}], path, workers=1)
    assert [json.loads(line)["result"]["y"] for line in lines(path)] == [1, 4]
    path.write_text("not a record\n" + whole.decode())
    with pytest.raises(UserError, match="line 1"):
        runner.run(jobs.square, [{"x": 3}], path)
    with pytest.raises(UserError, match="cannot be written"):
        runner.run(jobs.square, [{"x": 3}], path / "below")


@pytest.mark.long
def test_resumes_after_kills(tmp_path):
    """No result is lost or repeated after a SIGKILL.

    The first one hits the program alone, the second also its workers.
    """
    path = tmp_path / "results.jsonl"
    code = (
        "import jobs, sys; from tf_dropmax.experiments import runner\n"
        "if __name__ == '__main__':\n"
        "    numbers = [{'x': x} for x in range(12)]\n"
        "    runner.run(jobs.slow, numbers, sys.argv[1], int(sys.argv[2]))"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(path)]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(jobs.__file__)}
    kept = []
    for kill, least in ((os.kill, 3), (os.killpg, 7)):
        process = subprocess.Popen(
            [*command, "2"], env=environment, start_new_session=True, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while not (path.exists() and len(lines(path)) >= least):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kill(process.pid, signal.SIGKILL)
        process.wait()
        before, kept = kept, lines(path)
        assert kept[: len(before)] == before
        assert least <= len(kept) < 12
        for worker in {json.loads(line)["result"]["process"] for line in kept[len(before) :]}:
            while running(worker):  # Workers end with the program.
                assert time.monotonic() < deadline
                time.sleep(0.05)
    subprocess.run([*command, "1"], env=environment, check=True, timeout=120, capture_output=True)
    assert lines(path)[: len(kept)] == kept
    assert sorted(json.loads(line)["result"]["y"] for line in lines(path)) == list(range(12))
