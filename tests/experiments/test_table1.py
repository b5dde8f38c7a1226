"""Table 1: the search, the training runs, and the table; also the curves of Figure 3."""

import itertools
import json
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from scipy import stats

from tf_dropmax.experiments import checkpoint, convergence, data, runner, table1, train
from tf_dropmax.experiments.cli import main
from tf_dropmax.experiments.errors import UserError
from tf_dropmax.experiments.systems import SYSTEMS

JOB = {"column": "digits", "protocol": "small", "iterations": 24, "seed": 0, "phase": "final"}


def test_protocols():
    """Glorot's and He's initial weights, and a learning rate that falls twice."""
    deviations = [
        train.PROTOCOLS[name].network((28, 28, 1), 1, 0.0).weights[0].numpy().std()
        for name in ("released", "released-he")
    ]
    assert deviations == pytest.approx([np.sqrt(2 / (25 + 500)), np.sqrt(2 / 25)], rel=0.15)
    schedule = train._learning_rate(train.PROTOCOLS["released"], 300)
    rates = [float(schedule(step)) for step in (0, 100, 101, 200, 201, 299)]
    assert rates == pytest.approx([1e-3] * 2 + [1e-4] * 2 + [1e-5] * 2)
    assert train._learning_rate(train.PROTOCOLS["paper"], 300) == 1e-4


def test_a_run_is_reproducible_and_resumes(tmp_path, monkeypatch):
    settings = {"l2": 1e-4, **SYSTEMS["label"].options[0]}
    job = {**JOB, "method": "label", "settings": settings, "phase": "curve"}
    whole, again = train.execute({**job, "phase": "final"}), train.execute(job)
    assert whole["measures"] == again["measures"]  # Measuring during training changes nothing.
    assert len(whole["loss"]) == 4
    assert [point["step"] for point in again["curve"]] == [6, 12, 18, 24]
    assert again["curve"][-1]["test"] == again["measures"]["(18)"]
    assert again["curve"][-1]["train"]["NLL"] < again["curve"][0]["train"]["NLL"]
    clock = SimpleNamespace(monotonic=itertools.count(0, 30).__next__)
    monkeypatch.setattr(checkpoint, "time", clock)

    class Kill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    fit = keras.Sequential.fit

    def killed_fit(self, *args, callbacks, **kwargs):
        return fit(self, *args, callbacks=[*callbacks, Kill()], **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(keras.Sequential, "fit", killed_fit)
        with pytest.raises(KeyboardInterrupt):
            train.execute(job, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    resumed = train.execute(job, folder=tmp_path)
    assert resumed["steps"] == whole["steps"]
    np.testing.assert_allclose(resumed["loss"], whole["loss"], rtol=1e-6)
    assert resumed["measures"] == whole["measures"]
    assert resumed["curve"] == again["curve"]
    assert list(tmp_path.iterdir()) == []


def test_a_search_does_not_use_the_test_data(monkeypatch):
    rng = np.random.default_rng(0)
    y = np.arange(800) % 10
    x = (np.eye(10)[y][:, :, None, None] + 0.1 * rng.normal(size=(800, 10, 1, 1))).astype("float32")
    dataset = data.Dataset(x, y, x, (y + 1) % 10)  # Every label of the test data is wrong.
    monkeypatch.setitem(data.LOADERS, "digits", lambda: dataset)
    job = {**JOB, "method": "base", "settings": {"l2": 0.0}, "iterations": 120}
    assert train.execute({**job, "phase": "search"})["measures"]["(2)"]["error %"] < 10
    assert train.execute(job)["measures"]["(2)"]["error %"] > 90


def test_a_column_without_a_test_set_gets_one_that_no_search_uses(monkeypatch):
    digits = data.digits()
    numbered = digits._replace(x=np.arange(1797))  # Every image is its number.
    monkeypatch.setitem(data.LOADERS, "digits", lambda: numbered)
    search = train.split_for({**JOB, "seed": 1000, "phase": "search"})[1]
    final = [train.split_for({**JOB, "seed": seed})[1] for seed in (0, 1)]
    test = set(final[0].test[0])
    assert len(test) == 500
    assert set(final[1].test[0]) == test
    assert set(final[1].train[0]) != set(final[0].train[0])
    for part in (search.train, search.validation, final[0].train, final[1].train):
        assert not set(part[0]) & test


def test_the_search(tmp_path, monkeypatch, capsys):
    """Every method tries as many settings: weight decays, then its own with the best decay."""

    def execute(job, folder):
        settings = job["settings"]
        error = abs(settings["l2"] - 1e-3) + abs(settings.get("entropy_weight", 0) - 10)
        row = next(iter(SYSTEMS[job["method"]].rows))
        measures = {row: {"error %": error, "NLL": 0.0, "ECE %": 0.0}}
        return {"measures": measures, "seconds": 1.0, "steps": 1}

    def run(execute, jobs, path, workers, console):
        done.extend(job for job in jobs if job not in done)
        return [{"job": job, "result": execute(job)} for job in jobs]

    monkeypatch.setattr(train, "execute", execute)
    monkeypatch.setattr(runner, "run", run)
    for budget in range(1, 7):
        done = []
        table1.run("digits", "small", seeds=1, budget=budget, output=tmp_path / "results.jsonl")
        for method, system in SYSTEMS.items():
            mine = [job for job in done if job["method"] == method]
            tried = [job["settings"] for job in mine if job["phase"] == "search"]
            (final,) = [job["settings"] for job in mine if job["phase"] == "final"]
            assert len(tried) == (budget if budget > 1 else 0)
            assert final in tried or budget == 1
            own = {json.dumps({**settings, "l2": None}) for settings in tried}
            assert len(own) == min(len(system.options), 1 + budget // 2) or budget == 1
            if budget == 6:
                assert final["l2"] == 1e-3
                weights = {"label": 3.0, "attention": 10.0, "adaptive": 10.0}
                assert final.get("entropy_weight") == weights.get(method)
    with pytest.raises(UserError, match="at most 6"):
        table1.run("digits", "small", budget=7)
    assert "+-" in capsys.readouterr().out


def test_settings_are_chosen_by_validation_error():
    def record(error, nll):
        measures = {"(18)": {"error %": error, "NLL": nll}, "(16)": {"error %": 0.0, "NLL": 0.0}}
        return {"job": {"method": "label"}, "result": {"measures": measures}}

    best = record(2.0, 0.3)
    others = [record(2.5, 0.1), record(2.0, 0.4), record(float("nan"), 0.0)]
    for records in ([best, *others], [*others, best]):
        assert table1._best(records)["label"] is best


def test_the_difference_is_that_of_the_paired_t_test(rng):
    errors, base = rng.normal(5, 1, size=7), rng.normal(6, 1, size=7)
    low, high = stats.ttest_rel(errors, base).confidence_interval(0.95)
    expected = f"{np.mean(errors - base):+.2f} [{low:+.2f}, {high:+.2f}]"
    assert table1._difference(errors, {"error %": base}) == expected


def test_the_table_has_medians_means_and_spreads():
    def record(seed, error):
        measures = {"error %": error, "NLL": error / 10, "ECE %": error / 100}
        job = {"column": "mnist-1k", "protocol": "released", "iterations": 9, "method": "base"}
        result = {"measures": {"(2)": measures}, "seconds": 0.009 * (seed + 1), "steps": 9}
        return {"job": {**job, "settings": {}, "seed": seed}, "result": result}

    found = table1.table([record(seed, error) for seed, error in enumerate((1.0, 2.0, 6.0))])
    row = {column.header: next(iter(column.cells)) for column in found.columns}
    expected = {
        "median": "2.00",
        "mean +- sd": "3.00 +- 2.65",
        "NLL": "0.300",
        "ECE %": "0.03",
        "ms/step": "2.0",
        "paper": "7.17",
    }
    assert {name: row[name] for name in expected} == expected


@pytest.mark.long
def test_table1_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "digits.jsonl"
    digits = "table1 --column digits --protocol small --iterations 12 --workers 1"
    command = f"{digits} --methods base adaptive --seeds 2 --budget 2 --output {output}".split()
    assert main(command) == 0
    records = list(runner.read(output).values())
    assert len(records) == 2 * 2 + 2 * 2
    finals = [record for record in records if record["job"]["phase"] == "final"]
    finals = [record for record in finals if record["job"]["method"] == "adaptive"]
    errors = [record["result"]["measures"]["(18)"]["error %"] for record in finals]
    shown = capsys.readouterr().out
    assert f"{np.mean(errors):.2f} +- {np.std(errors, ddof=1):.2f}" in shown
    before = output.read_bytes()
    assert main(command) == 0
    assert output.read_bytes() == before
    curves = ["convergence", str(output), "--seeds", "1", "--workers", "1", "--methods"]
    assert main([*curves, "adaptive"]) == 0
    assert (tmp_path / "digits-convergence.png").read_bytes().startswith(b"\x89PNG")
    records = list(runner.read(tmp_path / "digits-convergence.jsonl").values())
    (curve,) = convergence.curves(records).values()
    assert curve["step"].tolist() == [6, 12]
    assert curve["test error %"].shape == (1, 2)
    assert curve["test error %"][0, -1] == errors[0]
    assert f"{curve['test NLL'][0, 0]:.4f}" in capsys.readouterr().out
    assert main([*curves, "label"]) == 1
    assert "no final runs of label" in capsys.readouterr().err
    ablation = tmp_path / "ablation.jsonl"
    command = f"{digits} --output {ablation} --systems parts --budget 1 --seeds 1 --methods".split()
    assert main([*command, "kl", "masks"]) == 0
    phases = [record["job"]["phase"] for record in runner.read(ablation).values()]
    assert phases == ["final", "final"]
    assert main([*command, "focal"]) == 1
    assert "kl+entropy" in capsys.readouterr().err
    monkeypatch.delenv("TF_DROPMAX_DATA", raising=False)
    assert main(["table1", "--column", "omniglot-242"]) == 1
    assert "TF_DROPMAX_DATA is not set" in capsys.readouterr().err
