"""Table 1: the search, the training runs, and the table; also the curves of Figure 3."""

import itertools
import json
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from packaging.version import Version
from scipy import stats
from scipy.special import log_softmax
from sklearn.metrics import log_loss, roc_auc_score

from tf_dropmax.calibration import best_temperature
from tf_dropmax.experiments import checkpoint, convergence, data, runner, table1, train
from tf_dropmax.experiments.cli import main
from tf_dropmax.experiments.errors import UserError
from tf_dropmax.experiments.systems import PEERS, SYSTEMS

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


def test_calibrated_measures_and_examples_of_no_class(rng, monkeypatch):
    """A temperature of the validation data, and areas under the ROC curve by scikit-learn."""
    y = np.arange(400) % 10
    x = (2 * np.eye(10)[y] + rng.normal(size=(400, 10))).astype("float32")
    dataset = data.Dataset(x, y, x[:200], y[:200], rng.normal(size=(50, 10)).astype("float32"))
    monkeypatch.setitem(data.LOADERS, "digits", lambda: dataset)
    monkeypatch.setitem(train.COLUMNS, "digits", train.Column("digits", 10, 20, 20, 150, 60))
    job = {**JOB, "protocol": "linear", "method": "adaptive", "settings": {"l2": 0.0}}
    predictions, predict = {}, SYSTEMS["adaptive"].rows["(16)"]
    spy = {"(16)": lambda model, x: predictions.setdefault(len(x), predict(model, x))}
    monkeypatch.setitem(train.ALL, "adaptive", SYSTEMS["adaptive"]._replace(rows=spy))
    found = train.execute({**job, "phase": "search"})
    labels = train.split_for({**job, "phase": "search"})[1].validation[1]
    temperature = best_temperature(predictions.pop(150), labels)
    assert found["temperatures"] == {"(16)": pytest.approx(temperature, abs=1e-4)}
    assert set(found["measures"]["(16)"]) == {"error %", "NLL", "ECE %"}
    measures = train.execute({**job, "temperatures": {"(16)": 2.0}})["measures"]["(16)"]
    log_p = log_softmax(predictions[200] / 2, axis=-1)
    assert measures["calibrated NLL"] == pytest.approx(log_loss(y[:200], np.exp(log_p)), rel=1e-5)
    entropies = [(np.exp(log_p) * -log_p).sum(-1) for log_p in (predictions[50], predictions[200])]
    expected = roc_auc_score([1] * 50 + [0] * 200, np.concatenate(entropies))
    assert measures["AUROC %, entropy"] == pytest.approx(100 * expected)
    assert 50 < measures["AUROC %, logit"] < 100


def test_feature_decay_penalises_the_features():
    job = {**JOB, "method": "base", "settings": {"l2": 0.0, "feature_decay": 0.3}}
    dataset = data.digits()
    model = train._compiled_model(job, dataset)
    x = dataset.x[:8]
    features = model.layers[0](x).numpy()
    # Before 3.13, Keras does not divide by the size of the batch.
    batch = 8 if Version(keras.__version__) >= Version("3.13") else 1
    model(x, training=True)
    expected = 0.3 * np.square(features).sum() / batch
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


def test_a_worker_loads_the_data_of_its_jobs_once(monkeypatch):
    loaded = []
    monkeypatch.setitem(data.LOADERS, "digits", lambda: loaded.append(1) or data.digits())
    for seed in range(3):
        train.split_for({**JOB, "seed": seed})
    assert len(loaded) == 1


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
        table1.run("digits", protocol, seeds=1, budget=budget, output=tmp_path / "results.jsonl")
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
                weight = {"label": 3.0, "attention": 3.0, "adaptive": 3.0}.get(method)
                assert settings["l2"] == 1e-3
                assert settings.get("entropy_weight") == weight
                assert settings.get("feature_decay") == (None if protocol == "linear" else 0.001)
                error = (0 if weight else 3) + (0.001 if protocol == "linear" else 0)
                assert final["temperatures"] == {next(iter(system.rows)): pytest.approx(1 + error)}
    with pytest.raises(UserError, match="at most 9"):
        table1.run("digits", "small", budget=10)
    with pytest.raises(UserError, match=r"Groups of methods are paper.* Received: unknown"):
        table1.run("digits", "small", ["base", "unknown"])
    assert list(table1._systems(["peers", "label", "focal"])) == [*PEERS, "label"]
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
        measures = {"error %": error, "NLL": error / 10, "calibrated ECE %": error / 100}
        job = {"column": "mnist-1k", "protocol": "released", "iterations": 9, "method": "base"}
        result = {"measures": {"(2)": measures}, "seconds": 0.009 * (seed + 1), "steps": 9}
        return {"job": {**job, "settings": {}, "seed": seed}, "result": result}

    found = table1.table([record(seed, error) for seed, error in enumerate((1.0, 2.0, 6.0))])
    row = {column.header: next(iter(column.cells)) for column in found.columns}
    expected = {
        "median": "2.00",
        "mean +- sd": "3.00 +- 2.65",
        "NLL": "0.300",
        "calibrated ECE %": "0.03",
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
    command = f"{digits} --output {ablation} --budget 1 --seeds 1 --methods".split()
    assert main([*command, "kl", "label-no-kl"]) == 0
    phases = [record["job"]["phase"] for record in runner.read(ablation).values()]
    assert phases == ["final", "final"]
    assert main([*command, "foca"]) == 1
    assert "kl+entropy" in capsys.readouterr().err
    monkeypatch.delenv("TF_DROPMAX_DATA", raising=False)
    assert main(["table1", "--column", "omniglot-242"]) == 1
    assert "TF_DROPMAX_DATA is not set" in capsys.readouterr().err
