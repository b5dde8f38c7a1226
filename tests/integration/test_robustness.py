"""Kills and full disks lose nothing that was trained. Threads and strange files do no harm."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest

from tf_dropmax import DropMaxHead, DropMaxLoss, set_predict_mode
from tf_dropmax.experiments import runner

KILLS = int(os.environ.get("TF_DROPMAX_KILLS", "2"))  # each costs the start of a process


def build():
    model = keras.Sequential([keras.Input((6,)), DropMaxHead(4, seed=1)])
    model.compile(keras.optimizers.Adam(0.01), DropMaxLoss())
    return model


@pytest.mark.long
def test_killed_at_random_moments(tmp_path):
    command = [sys.executable, str(Path(__file__).parents[1] / "workers.py"), "killed"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    subprocess.run([*command, str(whole)], check=True, capture_output=True, timeout=300)
    draw, kills = random.Random(0), 0
    while not (folder / "result.json").exists():
        (folder / "begun").unlink(missing_ok=True)
        with subprocess.Popen(
            [*command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            deadline = time.monotonic() + 120
            while not (folder / "begun").exists() and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            if kills < KILLS:
                time.sleep(draw.uniform(0, 0.5))
                process.kill()
                kills += 1
                process.communicate()
            else:
                assert process.wait(timeout=300) == 0, process.stderr.read()
    assert kills == KILLS
    expected, found = (json.loads((each / "result.json").read_text()) for each in (whole, folder))
    assert found["steps"] == expected["steps"] == 240
    for weight, other in zip(expected["weights"], found["weights"], strict=True):
        np.testing.assert_allclose(other, weight, atol=1e-5)
    loaded = keras.models.load_model(folder / "last.keras")
    np.testing.assert_allclose(loaded.get_weights()[0], expected["weights"][0], atol=1e-5)


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes: a write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_full_disk_while_backing_up(blobs, tmp_path):
    """From epoch 2 on, the disk is full."""
    x, y = blobs
    settings = {"batch_size": 40, "shuffle": False, "verbose": 0, "epochs": 4}
    whole, stopped, resumed = (build() for _ in range(3))
    whole.fit(x, y, **settings)

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup", double_checkpoint=True)

    def fill(epoch, logs):
        if epoch == 2:
            stack.enter_context(full_disk(2000))

    message = "File too large|write failed|unable to|Unable to"
    filling = keras.callbacks.LambdaCallback(on_epoch_begin=fill)
    with contextlib.ExitStack() as stack, pytest.raises(Exception, match=message):
        stopped.fit(x, y, callbacks=[filling, backup()], **settings)
    epochs = resumed.fit(x, y, callbacks=[backup()], **settings).epoch
    assert epochs in ([1, 2, 3], [2, 3])
    for weight, expected in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, atol=1e-6)


def test_full_disk_while_a_result_is_written(tmp_path):
    path = tmp_path / "results.jsonl"
    jobs = [{"number": number} for number in range(5)]
    runner.run(lambda job: {"square": job["number"] ** 2}, jobs[:3], path, workers=1)
    before = path.read_bytes()
    with full_disk(len(before) + 10), pytest.raises(OSError, match="File too large"):
        runner.run(lambda job: {"square": job["number"] ** 2}, jobs, path, workers=1)
    assert path.read_bytes().startswith(before)
    assert len(runner.read(path)) == 3
    records = runner.run(lambda job: {"square": job["number"] ** 2}, jobs, path, workers=1)
    assert [record["result"]["square"] for record in records] == [0, 1, 4, 9, 16]
    assert path.read_bytes().startswith(before)


@pytest.mark.parametrize("mode", ["expected", "exact"])
def test_eight_threads_predict_with_one_model(blobs, tmp_path, mode):
    x, y = blobs
    model = build()
    model.fit(x, y, verbose=0)
    set_predict_mode(model.layers[-1], mode)
    model.save(tmp_path / "model.keras")
    expected = model.predict(x, verbose=0)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    ways = [
        loaded,
        loaded.predict_on_batch,
        lambda rows: loaded.predict(rows, batch_size=32, verbose=0),
    ]

    def predict(number):
        return ways[number % 3](x[number:])

    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(predict, range(48))):
            np.testing.assert_allclose(found, expected[number:], atol=1e-5)


def test_a_class_of_another_package_is_not_run(tmp_path, monkeypatch):
    """An initializer of a branch, in a file. Its module is not imported either."""
    (tmp_path / "strange_package.py").write_text("class Strange:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path, broken = tmp_path / "model.keras", tmp_path / "strange.keras"
    build().save(path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(broken, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "config.json":
                config = json.loads(content)
                head = config["config"]["layers"][-1]["config"]
                head["retain"]["kernel_initializer"].update(
                    module="strange_package", class_name="Strange", registered_name=None
                )
                content = json.dumps(config).encode()
            target.writestr(name, content)
    with pytest.raises(Exception, match="Strange"):
        keras.models.load_model(broken)
    assert "strange_package" not in sys.modules
