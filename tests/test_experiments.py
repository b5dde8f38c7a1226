import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from sklearn.metrics import log_loss

from tf_dropmax import DropMaxHead
from tf_dropmax.experiments import data, measures
from tf_dropmax.experiments.__main__ import main
from tf_dropmax.experiments.errors import UserError


@pytest.fixture
def mnist_file(tmp_path, monkeypatch):
    """A small file of the real format."""
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()

    def images(count):
        y = np.arange(count) % 10
        x = rng.integers(0, 60, size=(count, 28, 28), dtype="uint8")
        x[np.arange(count), 2 * y, :] = 255
        return x, y.astype("uint8")

    (x, y), (x_test, y_test) = images(1200), images(100)
    np.savez(folder / "mnist.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return folder / "mnist.npz"


def test_measures(rng):
    p = rng.dirichlet(np.full(4, 0.3), size=500)
    labels = rng.integers(4, size=500)
    log_p = np.log(p).astype("float32")
    assert measures.negative_log_likelihood(log_p, labels) == pytest.approx(log_loss(labels, p, labels=range(4)), rel=1e-5)
    assert measures.error(log_p, labels) == pytest.approx(100 * np.mean(p.argmax(1) != labels))
    expected = 0.0
    for low in np.arange(15) / 15:  # bin by bin, in the words of the definition
        inside = [i for i in range(500) if low <= p[i].max() < low + 1 / 15]
        if inside:
            confidence = np.mean([p[i].max() for i in inside])
            accuracy = np.mean([p[i].argmax() == labels[i] for i in inside])
            expected += len(inside) / 500 * abs(confidence - accuracy)
    assert measures.calibration_error(log_p, labels) == pytest.approx(100 * expected, rel=1e-3)
    certain = np.log(np.eye(3) + 1e-30)
    assert measures.calibration_error(certain, np.array([0, 1, 1])) == pytest.approx(100 / 3)


def test_splits_do_not_overlap_and_follow_the_seed():
    digits = data.digits()
    split = data.split(digits, 20, validation=100, seed=3)
    assert [len(part[1]) for part in split] == [200, 100, 1497]
    np.testing.assert_array_equal(np.bincount(split.train[1]), np.full(10, 20))
    # Give every image a number of its own, and look for it.
    numbered = digits._replace(x=np.arange(len(digits.y)))
    parts = [set(x) for x, _ in data.split(numbered, 20, validation=100, seed=3)]
    assert set.union(*parts) == set(range(1797))
    assert sum(map(len, parts)) == 1797
    again, other = data.split(numbered, 20, 100, seed=3), data.split(numbered, 20, 100, seed=4)
    assert [set(x) for x, _ in again] == parts
    assert set(other.train[0]) != parts[0]
    for x, y in split:
        for index in range(5):
            assert digits.y[np.flatnonzero((digits.x == x[index]).all((1, 2, 3)))[0]] == y[index]
    with pytest.raises(UserError, match="at least 200 examples of each class"):
        data.split(digits, 200)


def test_mnist_from_a_local_file(mnist_file):
    dataset = data.mnist()
    assert dataset.x.shape == (1200, 28, 28, 1)
    assert (dataset.x.dtype, dataset.y.dtype, dataset.x.max()) == ("float32", "int64", 1)
    assert data.split(dataset, 5).test[0] is dataset.x_test
    assert dataset.classes == 10


@pytest.mark.parametrize("content", ["text", "cut", "keys", "shape"])
def test_a_broken_file_is_one_sentence(mnist_file, tmp_path, capsys, content):
    if content == "text":
        mnist_file.write_text("not an archive")
    elif content == "cut":
        mnist_file.write_bytes(mnist_file.read_bytes()[:5000])
    elif content == "flipped":
        broken = bytearray(mnist_file.read_bytes())
        broken[2000:2100] = bytes(100)
        mnist_file.write_bytes(broken)
    elif content == "npy":
        with mnist_file.open("wb") as stream:
            np.save(stream, np.zeros(3))
    else:
        arrays = dict(np.load(mnist_file))
        change = {
            "keys": {"x_test": None},
            "shape": {"x_train": np.zeros((2, 3))},
            "one-hot": {"y_train": np.eye(10)[arrays["y_train"]]},
        }[content]
        np.savez(mnist_file, **{key: value for key, value in {**arrays, **change}.items() if value is not None})
    assert main(["demo", "--dataset", "mnist", "--output", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert str(mnist_file) in message
    assert message.count("\n") == 1


def test_a_missing_file_is_one_sentence(tmp_path, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise Exception("URL fetch failure\nand more lines")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", no_network)
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    assert main(["demo", "--dataset", "mnist", "--output", str(tmp_path / "out")]) == 1
    assert f"there is no mnist.npz in or below {tmp_path}" in capsys.readouterr().err
    monkeypatch.delenv("TF_DROPMAX_DATA")
    assert main(["demo", "--dataset", "mnist", "--output", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "TF_DROPMAX_DATA is not set" in message
    assert message.count("\n") == 1
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path / "absent"))
    assert main(["demo", "--dataset", "mnist", "--output", str(tmp_path / "out")]) == 1
    assert "not a folder" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for output in [tmp_path / "file", tmp_path / "file" / "below"]:
        assert main(["demo", "--output", str(output)]) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"error: The output folder {output} cannot be written")
        assert message.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--epochs", "x"], ["--dataset", "iris"]])
def test_bad_options(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["digits", "mnist"])
def test_demo(mnist_file, tmp_path, dataset):
    command = [sys.executable, "-m", "tf_dropmax.experiments", "demo", "--dataset", dataset, "--seeds", "2", "--epochs", "12"]
    output = tmp_path / "results"
    run = subprocess.run(
        [*command, "--output", str(output)], capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "120"}
    )
    assert run.returncode == 0, run.stderr
    numbers = json.loads((output / "results.json").read_text())["results"]
    assert list(numbers) == ["softmax", *(f'DropMax, mode "{m}"' for m in ("expected", "sampled", "exact", "softmax"))]
    for row, values in numbers.items():
        assert row in run.stdout
        mean, spread = np.mean(values["error %"]), np.std(values["error %"], ddof=1)
        assert f"{mean:.3f} +- {spread:.3f}" in run.stdout
        assert mean < 40  # chance: 90
        assert len(values["NLL"]) == len(values["ECE %"]) == 2
    model = keras.models.load_model(output / "model.keras")
    assert isinstance(model.layers[-1], DropMaxHead)
    assert (output / "retain_probabilities.png").stat().st_size > 10_000
    for name in ["model.keras", "retain_probabilities.png", "results.json"]:
        assert str(output / name) in run.stdout


def test_demo_is_reproducible(tmp_path):
    from tf_dropmax.experiments import demo

    one, other = (demo.run(seeds=1, epochs=2, output=tmp_path / name) for name in "ab")
    assert one == other
