"""The measures, the files of MNIST, the command line and the demo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from sklearn.metrics import log_loss

from tf_dropmax import DropMaxHead, experiments
from tf_dropmax.experiments import data, demo, measures
from tf_dropmax.experiments.cli import main


@pytest.fixture
def mnist_file(tmp_path, monkeypatch):
    """A small file in the format of the real one."""
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
    found = measures.measures_of(log_p, labels)
    assert found["NLL"] == pytest.approx(log_loss(labels, p, labels=range(4)), rel=1e-5)
    assert found["error %"] == pytest.approx(100 * np.mean(p.argmax(1) != labels))
    expected = 0.0
    for low in np.arange(15) / 15:  # As in the definition, bin by bin.
        inside = [i for i in range(500) if low <= p[i].max() < low + 1 / 15]
        if inside:
            confidence = np.mean([p[i].max() for i in inside])
            accuracy = np.mean([p[i].argmax() == labels[i] for i in inside])
            expected += len(inside) / 500 * abs(confidence - accuracy)
    assert found["ECE %"] == pytest.approx(100 * expected, rel=1e-3)
    certain = np.log(np.eye(3) + 1e-30)
    assert measures.calibration_error(certain, np.array([0, 1, 1])) == pytest.approx(100 / 3)


def test_log_probabilities_of_almost_zero_count_fully():
    """-87.3 is the smallest one that the sampled mode and the sparsemax return."""
    smallest = np.log(np.finfo("float32").tiny)
    log_p = np.array([[0.0, smallest], [np.log(0.5), np.log(0.5)]], "float32")
    found = measures.negative_log_likelihood(log_p, np.array([1, 0]))
    assert found == pytest.approx((-smallest + np.log(2)) / 2, rel=1e-7)


def test_mnist_from_a_local_file(mnist_file):
    dataset = data.mnist()
    assert dataset.x.shape == (1200, 28, 28, 1)
    assert (dataset.x.dtype, dataset.y.dtype, dataset.x.max()) == ("float32", "int64", 1)
    assert data.split(dataset, 5).test[0] is dataset.x_test
    assert dataset.classes == 10


@pytest.mark.parametrize("content", ["text", "cut", "npy", "keys", "shape", "one-hot"])
def test_a_broken_file_is_one_line(mnist_file, tmp_path, capsys, content):
    if content == "text":
        mnist_file.write_text("not an archive")
    elif content == "cut":
        mnist_file.write_bytes(mnist_file.read_bytes()[:5000])
    elif content == "npy":
        with mnist_file.open("wb") as stream:
            np.save(stream, np.zeros(3))
    else:
        with np.load(mnist_file) as file:
            arrays = dict(file)
        arrays |= {
            "keys": {"x_test": None},
            "shape": {"x_train": np.zeros((2, 3))},
            "one-hot": {"y_train": np.eye(10)[arrays["y_train"]]},
        }[content]
        np.savez(mnist_file, **{key: x for key, x in arrays.items() if x is not None})
    assert main(["demo", "--dataset", "mnist", "--output", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert str(mnist_file) in message
    assert message.count("\n") == 1


def test_a_missing_file_is_one_line(tmp_path, monkeypatch, capsys):
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


def test_an_output_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
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


@pytest.mark.parametrize("dataset", ["digits", pytest.param("mnist", marks=pytest.mark.long)])
def test_demo(mnist_file, tmp_path, dataset):
    by_path = dataset == "digits"
    start = [str(Path(experiments.__file__).parent)] if by_path else ["-m", experiments.__name__]
    output = tmp_path / "results"
    options = ["--dataset", dataset, "--seeds", "2", "--epochs", "12", "--output", str(output)]
    environment = {**os.environ, "COLUMNS": "120"}
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
    command = [sys.executable, *start, "demo", *options]
    settings = {"capture_output": True, "text": True, "timeout": 300, "env": environment}
    run = subprocess.run(command, check=False, **settings)
    assert run.returncode == 0, run.stderr
    assert run.stderr == "" or not by_path
    numbers = json.loads((output / "results.json").read_text())["results"]
    modes = ("expected", "sampled", "exact", "softmax")
    assert list(numbers) == ["softmax", *(f'DropMax, mode "{mode}"' for mode in modes)]
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
    assert run.stdout.splitlines()[-1] == demo.conclusion(numbers)


def test_conclusion():
    def conclusion(softmax, dropmax):
        rows = {"softmax": softmax, 'DropMax, mode "expected"': dropmax}
        measures = {row: {"error %": errors, "NLL": nll} for row, (errors, nll) in rows.items()}
        return demo.conclusion(measures)

    assert conclusion(([5.0, 6.0], [0.3, 0.4]), ([4.0, 4.5], [0.2, 0.6])) == (
        'DropMax in mode "expected" had fewer errors (4.250 % against 5.500 %, a difference '
        "larger than the spread over seeds, 0.707), but the softmax had the better likelihood (NLL "
        "0.350 against 0.400, a difference not larger than the spread over seeds, 0.283)."
    )
    assert conclusion(([5.0], [0.3]), ([6.0], [0.4])) == (
        "The softmax had fewer errors (5.000 % against 6.000 %, one seed shows no spread) and the "
        "better likelihood (NLL 0.300 against 0.400, one seed shows no spread)."
    )
    assert "Neither head had fewer errors" in conclusion(([5.0], [0.3]), ([5.0], [0.4]))


@pytest.mark.long
def test_demo_is_reproducible(tmp_path):
    one, other = (demo.run(seeds=1, epochs=2, output=tmp_path / name) for name in "ab")
    assert one == other
