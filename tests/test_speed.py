import json
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from tf_dropmax.experiments import networks, speed
from tf_dropmax.experiments.__main__ import main
from tf_dropmax.experiments.systems import SYSTEMS


def test_paired_ratios_are_those_of_the_times(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    speeds = iter([*[1.0] * 2, *[2.0] * 100])  # the machine slows down; the ratio does not mind

    def work(seconds):
        clock.now += seconds * next(speeds)

    measured = speed.paired({"one": lambda: work(0.5), "three": lambda: work(1.5)}, repeats=3, least=0.01)
    assert measured == {"one": {"ms": 1000, "ratio": 1}, "three": {"ms": 3000, "ratio": 3}}


@pytest.mark.parametrize("compiled", [False, True])
def test_every_contender_computes_a_gradient(compiled):
    steps = speed.training_steps(4, compiled=compiled)
    for name, step in steps.items():
        value, gradients = step()
        assert np.isfinite(value), name
        if name == "naive":
            continue  # the gradient of `RelaxedBernoulli.sample` may be NaN
        assert all(np.abs(gradient).max() > 0 for gradient in gradients), name
    assert steps["DropMax"]()[0] != steps["DropMax"]()[0]  # masks are drawn anew


def test_the_naive_head_is_the_same_head():
    """Baseline and head have the same expected loss: the comparison is between equals."""
    x = tf.Variable(np.random.default_rng(0).normal(size=(speed.BATCH, speed.FEATURES)).astype("float32") / 20)
    y = tf.Variable(np.arange(speed.BATCH) % 4)
    heads = speed._heads(4, "float32")
    for head, _ in heads.values():
        head.build(x.shape)
    naive, ours = heads["naive"][0], heads["DropMax"][0]
    for ours_weight, naive_weight in zip(
        [ours.kernel, ours.bias, ours.retain_kernel, ours.retain_bias],
        [*naive.logits.weights, *naive.retain.weights],
        strict=True,
    ):
        naive_weight.assign(ours_weight)
    losses = [np.mean([speed._step(*heads[name], x, y, False)()[0] for _ in range(8)]) for name in ("naive", "DropMax")]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)


def test_the_systems_are_compared_with_the_base():
    systems = {name: SYSTEMS[name] for name in ("base", "label")}
    rows = list(speed._systems(1, networks.mlp, systems))
    assert [row["what"] for row in rows] == ["training step, T = 10: label", "training step, T = 242: label"]
    for row in rows:
        assert row["base"]["ratio"] == 1
        assert row["system"]["ratio"] == pytest.approx(row["system"]["ms"] / row["base"]["ms"])


def test_speed_command(tmp_path, capsys, monkeypatch):
    measure = speed._peak  # in a process for each head, of which one will do
    monkeypatch.setattr(speed, "_peak", lambda *of: measure(*of) if of == (3, "DropMax", False) else (8.0, 0.1))
    arguments = ["--classes", "3", "--policies", "float32", "--repeats", "1", "--output", str(tmp_path / "speed")]
    assert main(["speed", "--parts", "head", "memory", *arguments]) == 0
    results = json.loads((tmp_path / "speed" / "speed.json").read_text())
    assert [row["what"] for row in results["head"]] == ["T = 3, float32", "T = 3, float32, XLA"]
    memory = results["memory"][0]["DropMax"]
    assert 0 <= memory["MiB"] == 8 * memory["ratio"]
    assert results["environment"]["tensorflow"]
    shown = capsys.readouterr().out
    assert f"{results['head'][0]['DropMax']['ratio']:.2f} (" in shown
    (tmp_path / "file").touch()
    assert main(["speed", "--output", str(tmp_path / "file" / "below")]) == 1
    assert "cannot be written" in capsys.readouterr().err
