"""The comparisons and their reports: the search, the tables, the curves of Figure 3."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from tf_dropmax.experiments import comparisons, reports, runner, train
from tf_dropmax.experiments.__main__ import main
from tf_dropmax.experiments.console import UserError
from tf_dropmax.experiments.systems import GROUPS, PEERS, SYSTEMS


def test_the_search(tmp_path, monkeypatch, capsys):
    """Every method tries as many settings, and predicts with the best trial's temperatures."""

    def execute(job, folder):
        settings = job["settings"]
        error = abs(settings["l2"] - 1e-3) + abs(settings.get("entropy_weight", 0) - 3)
        error += abs(settings.get("feature_decay", 0) - 0.001)
        row = next(iter(SYSTEMS[job["method"]].rows))
        measures = {row: {"error %": error, "NLL": 0.0, "ECE %": 0.0}}
        found = {"measures": measures, "seconds": 1.0, "steps": 1}
        return {**found, "temperatures": {row: 1 + error}} if job["phase"] == "search" else found

    def run(execute, jobs, path, workers, console):
        done.extend(job for job in jobs if job not in done)
        return [{"job": job, "result": execute(job)} for job in jobs]

    monkeypatch.setattr(train, "execute", execute)
    monkeypatch.setattr(runner, "run", run)
    for budget, protocol in itertools.product(range(1, 10), ("small", "linear")):
        done = []
        comparisons.table1(
            "digits", protocol, seeds=1, budget=budget, output=tmp_path / "results.jsonl"
        )
        for method, system in SYSTEMS.items():
            mine = [job for job in done if job["method"] == method]
            tried = [job["settings"] for job in mine if job["phase"] == "search"]
            (final,) = [job for job in mine if job["phase"] == "final"]
            settings = final["settings"]
            if budget == 1:
                assert (tried, settings["l2"], "temperatures" in final) == ([], 1e-4, False)
                continue
            assert len(tried) == budget
            assert settings in tried
            other = {"l2": None, "feature_decay": None}
            own = {json.dumps({**settings, **other}) for settings in tried}
            assert len(own) == min(len(system.options), 1 + budget // 3)
            penalties = {settings.get("feature_decay", 0) for settings in tried}
            assert len(penalties) == (1 if protocol == "linear" else 1 + budget // 3)
            if budget == 9:
                weight = 3.0 if method.endswith("-paper-start") else None
                assert settings["l2"] == 1e-3
                assert settings.get("entropy_weight") == weight
                assert settings.get("feature_decay") == (None if protocol == "linear" else 0.001)
                error = (0 if weight else 3) + (0.001 if protocol == "linear" else 0)
                assert final["temperatures"] == {next(iter(system.rows)): pytest.approx(1 + error)}
    with pytest.raises(UserError, match="at most 9"):
        comparisons.table1("digits", "small", budget=10)
    with pytest.raises(UserError, match=r"Groups of methods are paper.* Received: unknown"):
        comparisons.table1("digits", "small", ["softmax", "unknown"])
    assert list(comparisons._systems(["peers", "label", "focal"])) == [*PEERS, "label"]
    assert "+-" in capsys.readouterr().out


def test_settings_are_chosen_by_validation_error():
    def record(error, nll):
        measures = {"(18)": {"error %": error, "NLL": nll}, "(16)": {"error %": 0.0, "NLL": 0.0}}
        return {"result": {"measures": measures}}

    best = record(2.0, 0.3)
    others = [record(2.5, 0.1), record(2.0, 0.4), record(float("nan"), 0.0)]
    for records in ([best, *others], [*others, best]):
        assert min(records, key=comparisons._validation) is best


def record(method, seed, error, column="mnist-1k", nll=0.1, ms=1.0, row="(2)"):
    """The record of a final run of nine steps."""
    job = {"column": column, "protocol": "released", "iterations": 9, "phase": "final"}
    measures = {"error %": error, "NLL": nll, "ECE %": 3.0, "calibrated ECE %": error / 100}
    result = {"measures": {row: measures}, "seconds": 9 * ms / 1000, "steps": 9}
    return {"job": {**job, "method": method, "settings": {}, "seed": seed}, "result": result}


def cells(table, row):
    return {column.header: list(column.cells)[row] for column in table.columns}


def test_the_table_has_medians_means_spreads_and_paired_differences():
    errors = {"softmax": (1.0, 2.0, 6.0, 3.0), "prior": (1.5, 2.0, 4.0)}
    records = [
        record(method, seed, error, ms=seed + 1)
        for method, values in errors.items()
        for seed, error in enumerate(values)
    ]
    records[4:] = records[:3:-1]  # The file has the seeds in the order in which the runs ended.
    table = reports.table(records)
    expected = {
        "seeds": "4",
        "median": "2.50",
        "mean +- sd": "3.00 +- 2.16",
        "NLL": "0.100",
        "calibrated ECE %": "0.03",
        "difference": "",
        "ms/step": "2.5",
    }
    found = cells(table, 0)
    assert {name: found[name] for name in expected} == expected
    paired = stats.ttest_rel(errors["prior"], errors["softmax"][:3])
    low, high = paired.confidence_interval(0.95)
    assert cells(table, 1)["difference"] == f"-0.50 [{low:+.2f}, {high:+.2f}]"
    assert cells(table, 1)["seeds"] == "3"


def test_the_summary_counts_tasks_with_clear_differences():
    draw = np.random.default_rng(0)
    effects = {"mnist-1k": (-1.0, 0.0), "mnist-5k": (1.0, -0.05), "digits": (0.0, -0.05)}
    records = [
        record(method, seed, 5 + error + 0.1 * draw.normal(), column, 0.1 + nll, ms)
        for column, (error, nll) in effects.items()
        for method, error, nll, ms in (("softmax", 0, 0, 1.0), ("label", error, nll, 1.5))
        for seed in range(4)
    ]
    for each in records:  # Otherwise all differences of the likelihood are alike.
        each["result"]["measures"]["(2)"]["NLL"] += 0.001 * draw.normal()
    expected = {
        "method": "label",
        "predicted by": "(2)",
        "tasks": "3",
        "error % better": "1",
        "error % worse": "1",
        "NLL better": "2",
        "NLL worse": "0",
        "ECE % better": "0",
        "ECE % worse": "0",
        "time of a step": "1.50",
    }
    assert cells(reports.summary(records), 0) == expected
    overview = cells(reports.overview(records), 1)
    assert overview["method"] == "label"
    assert overview["mnist-1k, released, 9 steps"].startswith("4.")
    assert overview["mnist-1k, released, 9 steps"].endswith(" / 3.00")


def test_curves():
    def curve(method, *errors):
        points = [
            {"step": 5 * 2**point, "train": measures, "test": {**measures, "error %": error}}
            for point, error in enumerate(errors)
            for measures in [{"error %": 0.0, "NLL": 0.1, "ECE %": 1.0}]
        ]
        return {"job": {"method": method}, "result": {"curve": points}}

    records = [curve("prior", 9, 8, 7), curve("prior", 9, 6, 5), record("softmax", 0, 1.0)]
    found = reports.curves(records)
    assert list(found) == ["prior"]
    assert found["prior"]["step"].tolist() == [5, 10, 20]
    assert found["prior"]["test error %"].tolist() == [[9, 8, 7], [9, 6, 5]]
    with pytest.raises(UserError, match="no curves"):
        reports.curves(records[2:])


def test_every_task_of_untuned_has_the_same_jobs_for_every_method(tmp_path, monkeypatch):
    ran = []

    def run(execute, jobs, path, workers, console):
        ran.extend(jobs)
        return [
            record(job["method"], job["seed"], 1.0 + job["seed"], job["column"]) for job in jobs
        ]

    monkeypatch.setattr(runner, "run", run)
    for loader in comparisons.data.LOADERS:
        monkeypatch.setitem(comparisons.data.LOADERS, loader, lambda: None)
    comparisons.untuned(output=tmp_path / "untuned.jsonl")
    seeds = {}
    for job in ran:
        key = job["column"], job["protocol"], job["iterations"]
        seeds.setdefault(key, {}).setdefault(job["method"], []).append(job["seed"])
        assert job["settings"]["l2"] == 1e-4
    assert len(seeds) == len(comparisons.TASKS) == 12
    for by_method in seeds.values():
        assert list(by_method) == list(GROUPS["untuned"])
        assert len({tuple(of) for of in by_method.values()}) == 1
    settings = {job["method"]: job["settings"] for job in ran if job["column"] == "mnist-1k"}
    assert settings["feature-decay"] == {"l2": 1e-4, "feature_decay": 0.01}
    assert settings["focal"] == {"l2": 1e-4, "gamma": 2.0}


@pytest.mark.long
def test_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "digits.jsonl"
    digits = "table1 --column digits --protocol small --iterations 12 --workers 1"
    options = f"--methods softmax prior --seeds 2 --budget 2 --curves --output {output}"
    command = f"{digits} {options}".split()
    assert main(command) == 0
    records = list(runner.read(output).values())
    assert len(records) == 2 * 2 + 2 * 2
    finals = [record for record in records if record["job"]["phase"] == "curve"]
    finals = [record for record in finals if record["job"]["method"] == "prior"]
    errors = [record["result"]["measures"]["(18)"]["error %"] for record in finals]
    shown = capsys.readouterr().out
    assert f"{np.mean(errors):.2f} +- {np.std(errors, ddof=1):.2f}" in shown
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    curve = reports.curves(finals)["prior"]
    assert curve["step"].tolist() == [6, 12]
    assert curve["test error %"][:, -1].tolist() == errors
    before = output.read_bytes()
    assert main(command) == 0
    assert output.read_bytes() == before
    table = capsys.readouterr().out.partition("|")[2]
    picture = tmp_path / "again.png"
    assert main(["report", str(output), "--picture", str(picture)]) == 0
    assert (
        capsys.readouterr().out.partition("|")[2].split("picture")[0] == table.split("picture")[0]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    for message in ("There is no file", "no final runs"):
        assert main(["report", str(tmp_path / "empty.jsonl")]) == 1
        assert message in capsys.readouterr().err
        (tmp_path / "empty.jsonl").touch()
    ablation = tmp_path / "ablation.jsonl"
    command = f"{digits} --output {ablation} --budget 1 --seeds 1 --methods".split()
    assert main([*command, "kl", "label-no-kl"]) == 0
    phases = [record["job"]["phase"] for record in runner.read(ablation).values()]
    assert phases == ["final", "final"]
    assert main([*command, "foca"]) == 1
    assert "kl+entropy" in capsys.readouterr().err
    monkeypatch.delenv("TF_DROPMAX_DATA", raising=False)
    assert main(["table1", "--column", "omniglot-242"]) == 1
    assert "TF_DROPMAX_DATA is not set" in capsys.readouterr().err
