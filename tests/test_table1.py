import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jobs
import keras
import numpy as np
import oracles
import pytest
import tensorflow as tf
from scipy import stats

from tf_dropmax import DropMaxHead
from tf_dropmax.experiments import convergence, data, runner, table1, train
from tf_dropmax.experiments.__main__ import main
from tf_dropmax.experiments.errors import UserError
from tf_dropmax.experiments.systems import ABLATIONS, PEERS, SYSTEMS

JOB = {"column": "digits", "protocol": "small", "iterations": 24, "seed": 0, "phase": "final"}


def lines(path):
    return path.read_bytes().split(b"\n")[:-1]


def running(process):
    """Whether there is such a process, and it is not a zombie that nobody has fetched."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_runner_keeps_order_and_does_nothing_twice(tmp_path):
    path = tmp_path / "below" / "results.jsonl"
    records = runner.run(jobs.square, [{"x": x} for x in (3, 1, 2)], path)
    assert [record["result"]["y"] for record in records] == [9, 1, 4]
    assert all(record["result"]["process"] != os.getpid() for record in records)
    assert records[0]["environment"]["tensorflow"]
    before = path.read_bytes()
    records = runner.run(jobs.square, [{"x": x} for x in (2, 5, 3)], path, workers=1)
    assert [record["result"]["y"] for record in records] == [4, 25, 9]
    assert path.read_bytes().startswith(before)
    assert len(lines(path)) == 4


def test_results_name_the_device(monkeypatch):
    assert runner.environment()["device"] == runner.device() != ""
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", {"GPU": [gpu]}.__getitem__)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", {gpu: {"device_name": "a fast one"}}.__getitem__)
    assert runner.device() == "a fast one"


def test_a_job_that_fails_does_not_take_the_others_along(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(UserError, match=r"1 of 3 jobs failed.*cannot be squared"):
        runner.run(jobs.square, [{"x": 1}, {"x": "broken"}, {"x": 2}], path)
    assert {record["result"]["y"] for record in runner.read(path).values()} == {1, 4}


def test_a_job_that_kills_its_process_does_not_take_the_others_along(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(UserError, match=r"2 of 8 jobs failed.*BrokenProcessPool"):
        runner.run(jobs.deadly, [{"x": x} for x in range(8)], path)
    assert sorted(record["result"]["y"] for record in runner.read(path).values()) == [1, 4, 9, 16, 36, 49]


def test_a_line_cut_short_is_done_again_and_a_strange_file_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    runner.run(jobs.square, [{"x": 1}, {"x": 2}], path, workers=1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert len(runner.read(path)) == 1
    runner.run(jobs.square, [{"x": 1}, {"x": 2}], path, workers=1)
    assert [json.loads(line)["result"]["y"] for line in lines(path)] == [1, 4]
    path.write_text("not of ours\n" + whole.decode())
    with pytest.raises(UserError, match="line 1"):
        runner.run(jobs.square, [{"x": 3}], path)
    with pytest.raises(UserError, match="cannot be written"):
        runner.run(jobs.square, [{"x": 3}], path / "below")


def test_killed_and_resumed(tmp_path):
    """SIGKILL after some results, to the program alone, then with its workers: no result is lost, none made twice."""
    path = tmp_path / "results.jsonl"
    code = (
        "import jobs, sys; from tf_dropmax.experiments import runner\n"
        "if __name__ == '__main__': runner.run(jobs.slow, [{'x': x} for x in range(12)], sys.argv[1], int(sys.argv[2]))"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(path)]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(jobs.__file__)}
    kept = []
    for kill, least in ((os.kill, 3), (os.killpg, 7)):
        process = subprocess.Popen([*command, "2"], env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (path.exists() and len(lines(path)) >= least):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kill(process.pid, signal.SIGKILL)
        process.wait()
        before, kept = kept, lines(path)
        assert kept[: len(before)] == before
        assert least <= len(kept) < 12
        for worker in {json.loads(line)["result"]["process"] for line in kept[len(before) :]}:
            while running(worker):  # workers end with the program
                assert time.monotonic() < deadline
                time.sleep(0.05)
    subprocess.run([*command, "1"], env=environment, check=True, timeout=120, capture_output=True)
    assert lines(path)[: len(kept)] == kept
    assert sorted(json.loads(line)["result"]["y"] for line in lines(path)) == list(range(12))


@pytest.mark.parametrize("method", {**SYSTEMS, **PEERS})
def test_every_system_trains_and_is_measured(method):
    system = {**SYSTEMS, **PEERS}[method]
    result = train.execute({**JOB, "method": method, "settings": {"l2": 1e-3, **system.options[-1]}, "iterations": 120})
    assert set(result["measures"]) == set(system.rows)
    assert result["loss"][-1] < result["loss"][0]
    for measures in result["measures"].values():
        assert measures["error %"] < 85  # chance: 90
        assert np.isfinite(list(measures.values())).all()


def test_ablated_heads(rng):
    """What each part contributes, on one batch with the same draws."""

    def entropy(retain_logits):
        rho = oracles.sigmoid(retain_logits)
        return -rho * np.log(rho) - (1 - rho) * np.log(1 - rho)

    features = rng.normal(size=(6, 3)).astype("float32")
    scores = {}
    for name, system in ABLATIONS.items():
        settings = system.options[0]
        head, _ = system.build(4, 1, 0.0, **settings)
        assert head.get_config()["predict_mode"] == ("softmax" if name == "softmax, entropy" else "expected")
        scores[name] = head(features, training=True).numpy()
        logits, retain_logits = features @ head.kernel.numpy(), features @ head.retain_kernel.numpy()
        expected = -settings["entropy_weight"] * entropy(retain_logits).sum(-1).mean()
        assert float(head.losses[0]) == pytest.approx(expected, rel=1e-4)
    assert len(scores) == 9
    plain = DropMaxHead(4, seed=1)(features, training=True).numpy()
    np.testing.assert_array_equal(scores["masks+kl+entropy"], plain)
    rho = oracles.sigmoid(retain_logits)
    np.testing.assert_allclose(scores["masks+kl"] - scores["masks"], np.log(rho), atol=1e-5)
    np.testing.assert_allclose(scores["kl"] - scores["kl+entropy"], entropy(retain_logits), atol=1e-5)
    w = np.exp(logits)
    for k in range(4):
        others = np.arange(4) != k
        expected = np.log(w[:, k] / (w[:, k] + (rho * w)[:, others].sum(-1)))
        np.testing.assert_allclose(scores["nothing"][:, k], expected, atol=1e-5)
    np.testing.assert_allclose(scores["softmax, entropy"], np.log(w / w.sum(-1, keepdims=True)), atol=1e-5)


def test_a_run_is_reproducible_and_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    job = {**JOB, "method": "label", "settings": {"l2": 1e-4, **SYSTEMS["label"].options[0]}, "phase": "curve"}
    whole, again = train.execute({**job, "phase": "final"}), train.execute(job)
    assert whole["measures"] == again["measures"]  # measuring on the way changes nothing
    assert len(whole["loss"]) == 4
    assert [point["step"] for point in again["curve"]] == [6, 12, 18, 24]
    assert again["curve"][-1]["test"] == again["measures"]["(18)"]
    assert again["curve"][-1]["train"]["NLL"] < again["curve"][0]["train"]["NLL"]
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=itertools.count(0, 30).__next__))

    class Kill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    fit = keras.Sequential.fit
    with monkeypatch.context() as patch:
        patch.setattr(
            keras.Sequential, "fit", lambda self, *args, callbacks, **kw: fit(self, *args, callbacks=[*callbacks, Kill()], **kw)
        )
        with pytest.raises(KeyboardInterrupt):
            train.execute(job, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    resumed = train.execute(job, folder=tmp_path)
    assert resumed["steps"] == whole["steps"]
    np.testing.assert_allclose(resumed["loss"], whole["loss"], rtol=1e-6)
    assert resumed["measures"] == whole["measures"]
    assert resumed["curve"] == again["curve"]
    assert list(tmp_path.iterdir()) == []


def test_the_search_does_not_see_the_test_data(monkeypatch):
    rng = np.random.default_rng(0)
    y = np.arange(800) % 10
    x = (np.eye(10)[y][:, :, None, None] + 0.1 * rng.normal(size=(800, 10, 1, 1))).astype("float32")
    dataset = data.Dataset(x, y, x, (y + 1) % 10)  # whoever looks at the test data finds every label wrong
    monkeypatch.setitem(data.LOADERS, "digits", lambda: dataset)
    job = {**JOB, "method": "base", "settings": {"l2": 0.0}, "iterations": 120}
    assert train.execute({**job, "phase": "search"})["measures"]["(2)"]["error %"] < 10
    assert train.execute(job)["measures"]["(2)"]["error %"] > 90


def test_the_search(tmp_path, monkeypatch, capsys):
    """Every method tries as many settings: weight decays first, then what is its own, at the best of these."""

    def execute(job, folder):
        settings = job["settings"]
        error = abs(settings["l2"] - 1e-3) + abs(settings.get("entropy_weight", 0) - 10)
        row = next(iter(SYSTEMS[job["method"]].rows))
        return {"measures": {row: {"error %": error, "NLL": 0.0, "ECE %": 0.0}}, "seconds": 1.0, "steps": 1}

    def run(execute, jobs, path, workers, console):
        done.extend(job for job in jobs if job not in done)
        return [{"job": job, "result": execute(job)} for job in jobs]

    monkeypatch.setattr(train, "execute", execute)
    monkeypatch.setattr(runner, "run", run)
    for budget in range(1, 7):
        done = []
        table1.run("digits", "small", seeds=1, budget=budget, output=tmp_path / "results.jsonl")
        for method, system in SYSTEMS.items():
            tried = [job["settings"] for job in done if job["method"] == method and job["phase"] == "search"]
            (final,) = [job["settings"] for job in done if job["method"] == method and job["phase"] == "final"]
            assert len(tried) == (budget if budget > 1 else 0)
            assert final in tried or budget == 1
            own = {json.dumps({k: v for k, v in settings.items() if k != "l2"}) for settings in tried}
            assert len(own) == min(len(system.options), 1 + budget // 2) or budget == 1
            if budget == 6:
                assert final["l2"] == 1e-3
                assert final.get("entropy_weight") == {"label": 3.0, "attention": 10.0, "adaptive": 10.0}.get(method)
    with pytest.raises(UserError, match="at most 6"):
        table1.run("digits", "small", budget=7)
    assert "+-" in capsys.readouterr().out


def test_a_column_without_a_test_set_gets_one_that_no_search_sees(monkeypatch):
    digits = data.digits()
    monkeypatch.setitem(data.LOADERS, "digits", lambda: digits._replace(x=np.arange(1797)))  # every image is its number
    search = train.split_for({**JOB, "seed": 1000, "phase": "search"})[1]
    final = [train.split_for({**JOB, "seed": seed})[1] for seed in (0, 1)]
    test = set(final[0].test[0])
    assert len(test) == 500
    assert set(final[1].test[0]) == test
    assert set(final[1].train[0]) != set(final[0].train[0])
    for part in (search.train, search.validation, final[0].train, final[1].train):
        assert not set(part[0]) & test


def test_weights_of_sums_over_classes_fall_with_their_number():
    """As the defaults of the head do."""
    for classes in (2, 10, 30, 31, 242, 1000):
        options = SYSTEMS["label"].options_for(classes)
        head = DropMaxHead(classes, posterior="label")
        assert options[0]["entropy_weight"] == pytest.approx(head.entropy_weight, rel=0.05)
        assert options[0]["auxiliary_weight"] == pytest.approx(head.auxiliary_weight, rel=0.05)
        assert head.entropy_weight == min(1, 30 / classes)
        assert head.auxiliary_weight == pytest.approx(0.1 * head.entropy_weight)
    assert SYSTEMS["random"].options_for(1000) == SYSTEMS["random"].options
    assert train.COLUMNS["digits"].classes == data.digits().classes


def test_settings_are_chosen_by_validation_error():
    def record(error, nll):
        return {"result": {"measures": {"(18)": {"error %": error, "NLL": nll}, "(16)": {"error %": 0.0, "NLL": 0.0}}}}

    best = record(2.0, 0.3)
    assert min([record(2.5, 0.1), record(2.0, 0.4), best, record(float("nan"), 0.0)], key=table1._validation) is best


def test_the_difference_is_that_of_the_paired_t_test(rng):
    errors, base = rng.normal(5, 1, size=7), rng.normal(6, 1, size=7)
    low, high = stats.ttest_rel(errors, base).confidence_interval(0.95)
    expected = f"{np.mean(errors - base):+.2f} [{low:+.2f}, {high:+.2f}]"
    assert table1._difference(errors, {"error %": base}) == expected


def test_table1_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "digits.jsonl"
    command = ["table1", "--column", "digits", "--protocol", "small", "--iterations", "12", "--methods", "base", "adaptive"]
    command += ["--workers", "1", "--seeds", "2", "--budget", "2", "--output", str(output)]
    assert main(command) == 0
    records = [json.loads(line) for line in lines(output)]
    assert len(records) == 2 * 2 + 2 * 2
    finals = [r for r in records if r["job"]["phase"] == "final" and r["job"]["method"] == "adaptive"]
    errors = [r["result"]["measures"]["(18)"]["error %"] for r in finals]
    shown = capsys.readouterr().out
    assert f"{np.mean(errors):.2f} +- {np.std(errors, ddof=1):.2f}" in shown
    before = output.read_bytes()
    assert main(command) == 0
    assert output.read_bytes() == before
    assert main(["convergence", str(output), "--methods", "adaptive", "--seeds", "1", "--workers", "1"]) == 0
    assert (tmp_path / "digits-convergence.png").read_bytes().startswith(b"\x89PNG")
    (curve,) = convergence.curves(list(runner.read(tmp_path / "digits-convergence.jsonl").values())).values()
    assert curve["step"].tolist() == [6, 12]
    assert curve["test error %"].shape == (1, 2)
    assert curve["test error %"][0, -1] == errors[0]
    assert f"{curve['test NLL'][0, 0]:.4f}" in capsys.readouterr().out
    assert main(["convergence", str(output), "--methods", "label"]) == 1
    assert "no final runs of label" in capsys.readouterr().err
    ablation = tmp_path / "ablation.jsonl"
    command = [
        "table1",
        "--column",
        "digits",
        "--protocol",
        "small",
        "--iterations",
        "12",
        "--systems",
        "parts",
        "--budget",
        "1",
        "--methods",
        "kl",
        "masks",
    ]
    assert main([*command, "--workers", "1", "--seeds", "1", "--output", str(ablation)]) == 0
    assert [json.loads(line)["job"]["phase"] for line in lines(ablation)] == ["final", "final"]
    assert main([*command, "--methods", "focal"]) == 1
    assert "kl+entropy" in capsys.readouterr().err
    monkeypatch.delenv("TF_DROPMAX_DATA", raising=False)
    assert main(["table1", "--column", "omniglot-242"]) == 1
    assert "TF_DROPMAX_DATA is not set" in capsys.readouterr().err


def test_omniglot_has_a_test_set_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    number = np.arange(4840)
    x = np.zeros((4840, 28, 28), "uint8")
    x[:, 0, 0], x[:, 0, 1] = number % 256, number // 256  # every image has a number of its own
    np.savez_compressed(tmp_path / "omniglot242.npz", x=x, y=number // 20, names=np.array(["a"] * 242))

    def numbers(images):
        images = np.round(255 * images)
        return set((images[:, 0, 0, 0] + 256 * images[:, 0, 1, 0]).astype(int))

    dataset = data.omniglot242()
    assert dataset.classes == 242
    np.testing.assert_array_equal(np.bincount(dataset.y_test), np.full(242, 5))
    search, final = data.split(dataset, 12, 726, seed=1), data.split(dataset, 15, seed=2)
    test = numbers(final.test[0])
    assert numbers(search.test[0]) == test
    assert numbers(final.train[0]) == set(number) - test
    assert not numbers(search.validation[0]) & (test | numbers(search.train[0]))

    turned = data.omniglot968()
    assert turned.classes == 968
    np.testing.assert_array_equal(np.bincount(turned.y_test), np.full(968, 5))
    for turn, corners in enumerate([((0, 0), (0, 1)), ((-1, 0), (-2, 0)), ((-1, -1), (-1, -2)), ((0, -1), (1, -1))]):
        (low, high), images = corners, np.round(255 * turned.x_test[turned.y_test // 242 == turn])
        found = (images[:, low[0], low[1], 0] + 256 * images[:, high[0], high[1], 0]).astype(int)
        assert set(found) == test  # the drawings that test are the same, however turned
        np.testing.assert_array_equal(found // 20, turned.y_test[turned.y_test // 242 == turn] % 242)

    np.savez_compressed(tmp_path / "omniglot242.npz", x=x[:100], y=number[:100] // 20)
    with pytest.raises(UserError, match="242 classes of 20 images"):
        data.omniglot242()


def test_fours_and_nines(tmp_path, monkeypatch):
    y = np.arange(60) % 10
    x = np.broadcast_to(y[:, None, None], (60, 28, 28)).astype("uint8")
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    dataset = data.mnist49()
    assert (len(dataset.y), len(dataset.y_test), dataset.classes) == (12, 4, 2)
    for images, labels in [(dataset.x, dataset.y), (dataset.x_test, dataset.y_test)]:
        np.testing.assert_array_equal(np.round(255 * images[:, 0, 0, 0]), np.where(labels == 1, 9, 4))


def test_a_split_without_a_number_takes_everything():
    dataset = data.Dataset(np.arange(100), np.arange(100) % 5, np.arange(7), np.zeros(7, "int64"))
    split = data.split(dataset, None, 30, seed=1)
    assert len(split.validation[0]) == 30
    assert set(split.train[0]) | set(split.validation[0]) == set(range(100))
    assert len(split.train[0]) == 70
    assert split.test[0] is dataset.x_test


def test_image_folder_and_awa2(rng, tmp_path, monkeypatch):
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    with pytest.raises(UserError, match=f"no JPEGImages in or below {tmp_path}"):
        data.awa2()
    folder = tmp_path / "Animals_with_Attributes2" / "JPEGImages"
    for name, colour, count in [("zebra", 250, 7), ("antelope", 10, 5)]:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = np.full((40, 60, 3), colour, "uint8")
            keras.utils.save_img(folder / name / f"{name}_{number}.jpg", image, scale=False)
    (folder / "zebra" / "notes.txt").write_text("not an image")
    dataset = data.image_folder(folder, (20, 30))
    assert (dataset.x.shape, dataset.x.dtype) == ((12, 20, 30, 3), "uint8")
    np.testing.assert_array_equal(dataset.y, [0] * 5 + [1] * 7)
    assert abs(dataset.x[dataset.y == 0].astype(int) - 10).max() < 5
    assert abs(dataset.x[dataset.y == 1].astype(int) - 250).max() < 5
    dataset = data.awa2()
    assert dataset.x.shape[1:] == (227, 227, 3)
    np.testing.assert_array_equal(np.bincount(dataset.y_test), [1, 1])
    assert len(dataset.y) == 10
    (folder / "zebra" / "broken.png").write_bytes(b"PNG?")
    with pytest.raises(UserError, match=r"broken\.png cannot be read as an image"):
        data.image_folder(folder)
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images"):
        data.image_folder(folder)
    with pytest.raises(UserError, match="two at least; it has 0"):
        data.image_folder(folder / "empty")


def test_alexnet_and_weights_from_a_file(tmp_path, rng, capsys):
    network = train.networks.alexnet((227, 227, 3), 1)
    sizes = [11 * 11 * 3 * 96 + 96, 5 * 5 * 96 * 256 + 256, 9 * 256 * 384 + 384, 9 * 384 * 384 + 384, 9 * 384 * 256 + 256]
    assert network.count_params() == sum(sizes) + (6 * 6 * 256 + 1) * 4096 + 4097 * 4096
    assert network(rng.integers(256, size=(1, 227, 227, 3), dtype="uint8")).shape == (1, 4096)
    job = {**JOB, "method": "base", "settings": {"l2": 0.0}, "iterations": 6}
    losses = {}
    for seed in (0, 5):  # the job's own seed is 0: weights from it change nothing
        train.networks.mlp((8, 8, 1), seed).save_weights(tmp_path / "start.weights.h5")
        losses[seed] = train.execute({**job, "weights": str(tmp_path / "start.weights.h5")})["loss"]
    assert train.execute(job)["loss"] == losses[0] != losses[5]
    assert main(["table1", "--column", "digits", "--weights", str(tmp_path / "absent.h5")]) == 1
    assert "no file of weights" in capsys.readouterr().err


def test_resnet34(rng):
    x = rng.uniform(size=(2, 32, 32, 3)).astype("float32")
    one, other = (train.networks.resnet34((32, 32, 3), seed, 1e-4) for seed in (1, 2))
    convolutions = [layer for layer in one.layers if isinstance(layer, keras.layers.Conv2D)]
    assert len([c for c in convolutions if c.kernel_size == (3, 3)]) == 33  # and the head is the 34th layer
    assert len(convolutions) == 33 + 3
    assert one.output_shape == (None, 512)
    assert [layer.output.shape[1] for layer in one.layers if isinstance(layer, keras.layers.Add)] == [32] * 3 + [16] * 4 + [
        8
    ] * 6 + [4] * 3
    kernels = [c.kernel.numpy().ravel()[:50] for c in convolutions]
    assert len({tuple(k) for k in kernels}) == len(kernels)
    assert not np.allclose(one(x), other(x))


@pytest.mark.parametrize(("name", "labels"), [("cifar10", 1), ("cifar100", 2)])
def test_cifar_from_the_binary_version(name, labels, rng, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    train_names = [f"data_batch_{i}.bin" for i in range(1, 6)] if labels == 1 else ["train.bin"]
    images = rng.integers(256, size=(24, 32, 32, 3), dtype="uint8")
    classes = np.arange(24) % 10
    for number, file in enumerate([*train_names, "test.bin" if labels == 2 else "test_batch.bin"]):
        part = slice(4 * number, 4 * number + 4)
        planes = images[part].transpose(0, 3, 1, 2).reshape(4, -1)
        coarse = np.full((4, labels - 1), 99, "uint8")
        np.concatenate([coarse, classes[part, None].astype("uint8"), planes], axis=1).tofile(tmp_path / file)
    dataset = data.LOADERS[name]()
    count = 4 * len(train_names)
    np.testing.assert_allclose(dataset.x * 255, images[:count], atol=1e-4)
    np.testing.assert_array_equal(dataset.y, classes[:count])
    np.testing.assert_allclose(dataset.x_test * 255, images[count : count + 4], atol=1e-4)
    np.testing.assert_array_equal(dataset.y_test, classes[count : count + 4])
    (tmp_path / train_names[0]).write_bytes(b"short")
    with pytest.raises(UserError, match=f"{train_names[0]} is not a file of CIFAR"):
        data.LOADERS[name]()
    (tmp_path / train_names[0]).unlink()

    def no_network():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", no_network)
    with pytest.raises(UserError, match=f"no {train_names[0]}"):
        data.LOADERS[name]()
    monkeypatch.setattr(
        getattr(keras.datasets, name), "load_data", lambda: ((images, classes[:, None]), (images[:3], classes[:3, None]))
    )
    dataset = data.LOADERS[name]()
    assert dataset.x.dtype == "float32"
    assert dataset.y.shape == (24,)
    np.testing.assert_array_equal(dataset.y_test, classes[:3])


@pytest.mark.parametrize("network", ["lenet", "tutorial_cnn"])
def test_networks(network, rng):
    x = rng.uniform(size=(2, 28, 28, 1)).astype("float32")
    build = getattr(train.networks, network)
    one, same, other = (build((28, 28, 1), seed, 1e-3) for seed in (1, 1, 2))
    # As counted by hand from the descriptions.
    parameters = {
        "lenet": 5 * 5 * 20 + 20 + 5 * 5 * 20 * 50 + 50 + 4 * 4 * 50 * 500 + 500,
        "tutorial_cnn": 5 * 5 * 32 + 32 + 5 * 5 * 32 * 64 + 64 + 7 * 7 * 64 * 1024 + 1024,
    }
    assert one.count_params() == parameters[network]
    np.testing.assert_array_equal(one(x), same(x))
    assert not np.allclose(one(x), other(x))
    kernels = [w.numpy() for w in one.weights if w.path.endswith("kernel")]
    for kernel in kernels:
        inputs, outputs = np.prod(kernel.shape[:-1]), kernel.shape[-1] * np.prod(kernel.shape[:-2])
        # Glorot's law; a normal law cut off at two standard deviations, of 0.1 before the cut.
        deviation = {"lenet": np.sqrt(2 / (inputs + outputs)), "tutorial_cnn": 0.1}[network]
        assert kernel.std() == pytest.approx(deviation, rel=0.15)
    biases = [w.numpy() for w in one.weights if w.path.endswith("bias")]
    assert all((bias == np.float32({"lenet": 0, "tutorial_cnn": 0.1}[network])).all() for bias in biases)
    assert len(kernels) == len(biases) == 3
    squares = sum(float(np.sum(np.square(w.numpy()))) for w in one.weights)
    assert float(sum(one.losses)) == pytest.approx(1e-3 / 2 * squares, rel=1e-5)


def test_protocols():
    """The authors' code: Glorot's weights, and a learning rate that falls twice. `released-he`: He's weights."""
    deviations = [
        train.PROTOCOLS[name].network((28, 28, 1), 1, 0.0).weights[0].numpy().std() for name in ("released", "released-he")
    ]
    assert deviations == pytest.approx([np.sqrt(2 / (25 + 500)), np.sqrt(2 / 25)], rel=0.15)
    rate = train._learning_rate(train.PROTOCOLS["released"], 300)
    assert [float(rate(step)) for step in (0, 100, 101, 200, 201, 299)] == pytest.approx([1e-3] * 2 + [1e-4] * 2 + [1e-5] * 2)
    assert train._learning_rate(train.PROTOCOLS["paper"], 300) == 1e-4


@pytest.mark.parametrize("method", ["base", "attention", "adaptive", "label"])
def test_all_weights_but_those_of_the_retain_branch_are_decayed(method, rng):
    head, _ = SYSTEMS[method].build(4, 1, 0.1, **SYSTEMS[method].options[0])
    head.build((None, 3))
    head.bias.assign(rng.normal(size=4))
    expected = 0.1 / 2 * sum(float(np.sum(np.square(w))) for w in (head.kernel, head.bias))
    assert float(sum(head.losses)) == pytest.approx(expected, rel=1e-5)


def test_the_table_has_medians_means_and_spreads():
    def record(seed, error):
        measures = {"error %": error, "NLL": error / 10, "ECE %": error / 100}
        job = {"column": "mnist-1k", "protocol": "released", "iterations": 9, "method": "base", "settings": {}, "seed": seed}
        return {"job": job, "result": {"measures": {"(2)": measures}, "seconds": 0.009 * (seed + 1), "steps": 9}}

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
