"""The command line and the demo."""

import json

import keras
import numpy as np
import pytest

from tf_dropmax import DropMaxHead
from tf_dropmax.experiments import demo
from tf_dropmax.experiments.__main__ import main


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


def test_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    output = tmp_path / "results"
    # 72 steps. After 36, most samples of 30 masks are still wrong.
    assert main(["demo", "--seeds", "2", "--epochs", "12", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    numbers = json.loads((output / "results.json").read_text())["results"]
    modes = ("expected", "sampled", "exact", "softmax")
    assert list(numbers) == ["softmax", *(f'DropMax, mode "{mode}"' for mode in modes)]
    for row, values in numbers.items():
        assert row in printed
        mean, spread = np.mean(values["error %"]), np.std(values["error %"], ddof=1)
        assert f"{mean:.3f} +- {spread:.3f}" in printed
        assert mean < 40  # chance: 90
        assert len(values["NLL"]) == len(values["ECE %"]) == 2
    model = keras.models.load_model(output / "model.keras")
    assert isinstance(model.layers[-1], DropMaxHead)
    assert (output / "retain_probabilities.png").stat().st_size > 10_000
    for name in ["model.keras", "retain_probabilities.png", "results.json"]:
        assert str(output / name) in printed


@pytest.mark.long
def test_demo_is_reproducible(tmp_path):
    one, other = (demo.run(seeds=1, epochs=2, output=tmp_path / name) for name in "ab")
    assert one == other
