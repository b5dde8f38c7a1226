"""Kills, full disks, threads and broken files lose nothing that was trained or saved."""

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


def build(seed=1):
    hidden = keras.layers.Dense(
        32, "relu", kernel_initializer=keras.initializers.GlorotUniform(seed)
    )
    model = keras.Sequential([keras.Input((6,)), hidden, DropMaxHead(4, seed=seed)])
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


class FillDisk(keras.callbacks.Callback):
    """From epoch 2 on, the disk is full."""

    def __init__(self, stack, size):
        super().__init__()
        self.stack, self.size = stack, size

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            self.stack.enter_context(full_disk(self.size))


@pytest.mark.parametrize(
    "size", [2000, *(pytest.param(size, marks=pytest.mark.long) for size in (0, 12_000))]
)
def test_full_disk_while_backing_up(blobs, tmp_path, size):
    x, y = blobs
    settings = {"batch_size": 40, "shuffle": False, "verbose": 0, "epochs": 4}
    whole = build()
    whole.fit(x, y, **settings)

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup", double_checkpoint=True)

    with (
        contextlib.ExitStack() as stack,
        pytest.raises(Exception, match=r"File too large|write failed|unable to|Unable to"),
    ):
        build().fit(x, y, callbacks=[FillDisk(stack, size), backup()], **settings)
    resumed = build()
    epochs = resumed.fit(x, y, callbacks=[backup()], **settings).epoch
    assert epochs in ([1, 2, 3], [2, 3])
    if size == 0:  # it failed before anything was overwritten
        assert epochs == [2, 3]
    for weight, expected in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, atol=1e-6)


@pytest.mark.parametrize("size", [0, 2000, 12_000])
def test_full_disk_while_saving_checkpoints_with_names_of_their_own(blobs, tmp_path, size):
    x, y = blobs
    saving = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(Exception, match=r"File too large|write failed|unable to|Unable to"),
    ):
        build().fit(x, y, epochs=4, callbacks=[FillDisk(stack, size), saving], verbose=0)
    for name in ("1.keras", "2.keras"):
        assert np.isfinite(keras.models.load_model(tmp_path / name).predict(x, verbose=0)).all()


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
    draw = np.random.default_rng(0)
    choices = [draw.permutation(len(x))[: 20 * (1 + number % 8)] for number in range(48)]

    def predict(number):
        rows = x[choices[number]]
        if number % 3 == 0:
            return loaded(rows).numpy()
        if number % 3 == 1:
            return loaded.predict_on_batch(rows)
        return loaded.predict(rows, batch_size=32, verbose=0)

    with ThreadPoolExecutor(8) as pool:
        for rows, found in zip(choices, pool.map(predict, range(48)), strict=True):
            np.testing.assert_allclose(found, expected[rows], atol=1e-5)


@pytest.fixture(scope="module")
def saved(blobs, tmp_path_factory):
    x, y = blobs
    model = build()
    model.fit(x, y, verbose=0)
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    model.save(path)
    return path, model.predict(x, verbose=0), x


def test_a_file_cut_short_is_an_error(saved, tmp_path):
    path, _, _ = saved
    whole = path.read_bytes()
    for part in (0.0, 0.01, 0.3, 0.6, 0.9, 0.99, 0.9999):
        (tmp_path / "cut.keras").write_bytes(whole[: int(part * len(whole))])
        with pytest.raises((ValueError, OSError, KeyError, zipfile.BadZipFile)):
            keras.models.load_model(tmp_path / "cut.keras")


def test_a_flipped_bit_is_an_error_or_without_effect(saved, tmp_path):
    path, expected, x = saved
    whole = path.read_bytes()
    refused, draw = 0, np.random.default_rng(0)
    for position in draw.integers(8 * len(whole), size=60):
        broken = bytearray(whole)
        broken[position // 8] ^= 1 << (position % 8)
        (tmp_path / "flipped.keras").write_bytes(broken)
        try:
            loaded = keras.models.load_model(tmp_path / "flipped.keras")
        except Exception:
            refused += 1
        else:
            np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    assert refused > 40


@pytest.mark.parametrize("where", ["layer", "loss", "initializer"])
def test_a_class_of_another_package_is_not_run(saved, tmp_path, monkeypatch, where):
    """Neither is its module imported."""
    path, _, _ = saved
    (tmp_path / "strange_package.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Strange:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    broken = tmp_path / "strange.keras"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(broken, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "config.json":
                config = json.loads(content)
                head = config["config"]["layers"][-1]
                chosen = {
                    "layer": head,
                    "loss": config["compile_config"]["loss"],
                    "initializer": head["config"]["retain"]["kernel_initializer"],
                }[where]
                chosen.update(module="strange_package", class_name="Strange", registered_name=None)
                content = json.dumps(config).encode()
            target.writestr(name, content)
    with pytest.raises(Exception, match="Strange"):
        keras.models.load_model(broken)
    assert not (tmp_path / "imported").exists()
    assert "strange_package" not in sys.modules
