"""The measurements of speed and memory."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tf_dropmax.experiments import speed
from tf_dropmax.experiments.__main__ import main


def test_paired_ratios_are_those_of_the_times(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    speeds = iter([*[1.0] * 2, *[2.0] * 100])  # The machine slows down.

    def work(seconds):
        clock.now += seconds * next(speeds)

    functions = {"one": lambda: work(0.5), "three": lambda: work(1.5)}
    measured = speed.paired(functions, repeats=3, least=0.01)
    assert measured == {"one": {"ms": 1000, "ratio": 1}, "three": {"ms": 3000, "ratio": 3}}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", [*speed._TWO_PRODUCTS, *speed._THREE_PRODUCTS])
def test_every_contender_computes_a_gradient(name, compiled):
    step = speed.training_step(name, 4, compiled)
    value, gradients = step()
    assert np.isfinite(value)
    assert all(np.abs(gradient).max() > 0 for gradient in gradients)
    if name == "prior":
        assert step()[0] != value  # The masks differ.


@pytest.mark.long
def test_the_first_step_is_compiled_anew_every_time(monkeypatch):
    made = []
    make = speed.training_step

    def training_step(name, *arguments, **options):
        made.append(name)
        return make(name, *arguments, **options)

    monkeypatch.setattr(speed, "training_step", training_step)
    rows = list(speed.compilation([3], repeats=1))
    assert [row["what"] for row in rows] == [
        "first step of the head, T = 3, XLA",
        "first step of LeNet, T = 3, XLA",
    ]
    assert made.count("prior") >= 2
    assert rows[0]["Dense(2T)"]["ratio"] == 1


@pytest.mark.long
def test_prediction_is_timed_in_every_mode():
    *heads, network = speed.predict(1)
    modes = ["expected", "sampled, S = 30", "sampled, S = 100", "exact"]
    assert list(heads[0]) == ["what", "Dense(2T), softmax", *modes]
    assert list(heads[1]) == ["what", "Dense(2T), softmax", "expected"]
    assert list(network) == ["what", *modes]
    assert all(row[name]["ms"] > 0 for row in heads for name in list(row)[1:])


@pytest.mark.long
def test_speed_command(tmp_path, capsys, monkeypatch):
    measure = speed.peak

    def peak(name, classes, compiled, batch):  # Every measurement starts a process. One is enough.
        if (name, compiled) == ("prior", False):
            return measure(name, classes, compiled, batch)
        return {"MiB": 8.0, "ms": 0.1}

    monkeypatch.setattr(speed, "peak", peak)
    options = f"--classes 3 --policies float32 --repeats 1 --output {tmp_path / 'speed.json'}"
    assert main(["speed", "--parts", "head", "network", "memory", *options.split()]) == 0
    results = json.loads((tmp_path / "speed.json").read_text())
    what = ["T = 3, float32"] * 2 + ["T = 3, float32, XLA"] * 2
    assert [row["what"] for row in results["head"]] == what
    assert list(results["head"][1]) == ["what", "Dense(3T)", "label"]
    assert results["network"][0]["Dense(T)"]["ratio"] == 1
    memory = results["memory"][0]["prior"]
    assert 0 <= memory["MiB"] == 8 * memory["ratio"]
    assert memory["ms"] > 0
    assert results["environment"]["tensorflow"]
    assert f"{results['head'][0]['prior']['ratio']:.2f} (" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert main(["speed", "--output", str(tmp_path / "file" / "below")]) == 1
    assert "cannot be written" in capsys.readouterr().err
