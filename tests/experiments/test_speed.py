"""The measurements of speed and memory."""

import json
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dropmax.experiments import networks, speed_heads, speed_parts, timing
from tf_dropmax.experiments.cli import main
from tf_dropmax.experiments.systems import SYSTEMS


def test_paired_ratios_are_those_of_the_times(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    speeds = iter([*[1.0] * 2, *[2.0] * 100])  # The machine slows down.

    def work(seconds):
        clock.now += seconds * next(speeds)

    functions = {"one": lambda: work(0.5), "three": lambda: work(1.5)}
    measured = timing.paired(functions, repeats=3, least=0.01)
    assert measured == {"one": {"ms": 1000, "ratio": 1}, "three": {"ms": 3000, "ratio": 3}}


@pytest.mark.parametrize("compiled", [False, True])
def test_every_contender_computes_a_gradient(compiled):
    steps = speed_heads.training_steps(4, compiled=compiled)
    for name, step in steps.items():
        value, gradients = step()
        assert np.isfinite(value), name
        if name == "naive":
            continue  # The gradient of `RelaxedBernoulli.sample` may be NaN.
        assert all(np.abs(gradient).max() > 0 for gradient in gradients), name
    assert steps["DropMax"]()[0] != steps["DropMax"]()[0]  # The masks differ.


def test_the_naive_head_has_the_same_expected_loss(rng):
    keras.utils.set_random_seed(0)
    shape = speed_heads.BATCH, speed_heads.FEATURES
    x = tf.Variable(rng.normal(size=shape).astype("float32") / 20)
    y = tf.Variable(np.arange(speed_heads.BATCH) % 4)
    heads = speed_heads.heads_and_losses(4, "float32")
    for head, _ in heads.values():
        head.build(x.shape)
    naive, ours = heads["naive"][0], heads["DropMax"][0]
    naive.logits.set_weights([ours.kernel, ours.bias])
    naive.retain.set_weights([ours.retain_kernel, ours.retain_bias])
    steps = [speed_heads.training_step(*heads[name], x, y) for name in ("naive", "DropMax")]
    losses = [np.mean([step()[0] for _ in range(8)]) for step in steps]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)


def test_the_systems_are_compared_with_the_base():
    systems = {name: SYSTEMS[name] for name in ("base", "label")}
    rows = list(speed_parts.systems(1, networks.mlp, systems))
    what = [row["what"] for row in rows]
    assert what == ["training step, T = 10: label", "training step, T = 242: label"]
    for row in rows:
        assert row["base"]["ratio"] == 1
        assert row["system"]["ratio"] == pytest.approx(row["system"]["ms"] / row["base"]["ms"])


@pytest.mark.long
def test_the_first_step_is_compiled_anew_every_time(monkeypatch):
    made = []
    make = speed_parts.training_steps

    def training_steps(*arguments, **options):
        made.append(options["names"][0])
        return make(*arguments, **options)

    monkeypatch.setattr(speed_parts, "training_steps", training_steps)
    monkeypatch.setattr(speed_parts, "_first_step_of_lenet", lambda *of: 0)
    row, _ = speed_parts.compilation([3], repeats=1)
    assert made.count("DropMax") >= 2
    assert row["label"]["goal"] == 2
    assert row["Dense(2T)"]["ratio"] == 1


@pytest.mark.long
def test_speed_command(tmp_path, capsys, monkeypatch):
    measure = speed_parts.peak

    def peak(*of, batch=256):  # Every measurement starts a process. One is enough.
        return measure(*of) if of == (3, "DropMax", False) else (8.0, 0.1)

    monkeypatch.setattr(speed_parts, "peak", peak)
    options = f"--classes 3 --policies float32 --repeats 1 --output {tmp_path / 'speed'}".split()
    assert main(["speed", "--parts", "head", "memory", *options]) == 0
    results = json.loads((tmp_path / "speed" / "speed.json").read_text())
    what = ["T = 3, float32"] * 2 + ["T = 3, float32, XLA"] * 2
    assert [row["what"] for row in results["head"]] == what
    assert list(results["head"][1]) == ["what", "Dense(3T)", "label"]
    memory = results["memory"][0]["DropMax"]
    assert 0 <= memory["MiB"] == 8 * memory["ratio"]
    assert results["environment"]["tensorflow"]
    shown = capsys.readouterr().out
    assert f"{results['head'][0]['DropMax']['ratio']:.2f} (" in shown
    assert " MiB, goal 1.4)" in shown
    (tmp_path / "file").touch()
    assert main(["speed", "--output", str(tmp_path / "file" / "below")]) == 1
    assert "cannot be written" in capsys.readouterr().err
