"""Training runs: networks, protocols, measures, and what a killed run resumes."""

import itertools
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from packaging.version import Version
from scipy.special import log_softmax
from sklearn.metrics import log_loss, roc_auc_score

from tf_dropmax.calibration import best_temperature
from tf_dropmax.experiments import data, measures, networks, train
from tf_dropmax.experiments.systems import ALL

JOB = {"column": "digits", "protocol": "small", "iterations": 24, "seed": 0, "phase": "final"}


@pytest.mark.parametrize("network", ["lenet", "tutorial_cnn"])
def test_networks(network, rng):
    x = rng.uniform(size=(2, 28, 28, 1)).astype("float32")
    build = getattr(networks, network)
    one, same, other = (build((28, 28, 1), seed, 1e-3) for seed in (1, 1, 2))
    # Counted by hand.
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
        # Glorot's deviation; and 0.1, the deviation of the normal law before it is truncated.
        deviation = {"lenet": np.sqrt(2 / (inputs + outputs)), "tutorial_cnn": 0.1}[network]
        assert kernel.std() == pytest.approx(deviation, rel=0.15)
    biases = [w.numpy() for w in one.weights if w.path.endswith("bias")]
    start = np.float32({"lenet": 0, "tutorial_cnn": 0.1}[network])
    assert all((bias == start).all() for bias in biases)
    assert len(kernels) == len(biases) == 3
    squares = sum(float(np.sum(np.square(w.numpy()))) for w in one.weights)
    assert float(sum(one.losses)) == pytest.approx(1e-3 / 2 * squares, rel=1e-5)


def test_resnet34(rng):
    x = rng.uniform(size=(2, 32, 32, 3)).astype("float32")
    one, other = (networks.resnet34((32, 32, 3), seed, 1e-4) for seed in (1, 2))
    convolutions = [layer for layer in one.layers if isinstance(layer, keras.layers.Conv2D)]
    # The head is the 34th layer.
    assert len([c for c in convolutions if c.kernel_size == (3, 3)]) == 33
    assert len(convolutions) == 33 + 3
    assert one.output_shape == (None, 512)
    blocks = [layer for layer in one.layers if isinstance(layer, keras.layers.Add)]
    heights = [block.output.shape[1] for block in blocks]
    assert heights == [32] * 3 + [16] * 4 + [8] * 6 + [4] * 3
    kernels = [c.kernel.numpy().ravel()[:50] for c in convolutions]
    assert len({tuple(k) for k in kernels}) == len(kernels)
    assert not np.allclose(one(x), other(x))


def test_protocols(rng):
    """A learning rate that falls twice, and dropout before the head."""
    schedule = train._learning_rate(train.PROTOCOLS["released"], 300)
    rates = [float(schedule(step)) for step in (0, 100, 101, 200, 201, 299)]
    assert rates == pytest.approx([1e-3] * 2 + [1e-4] * 2 + [1e-5] * 2)
    assert train._learning_rate(train.PROTOCOLS["paper"], 300) == 1e-4
    x = rng.uniform(size=(20, 28, 28, 1)).astype("float32")
    for name, size in (("released-dropout", 500), ("cnn", 64)):
        network = train.PROTOCOLS[name].network((28, 28, 1), 1)
        dropped = np.mean(network(x, training=True).numpy() == 0, axis=0)
        kept = np.all(network(x).numpy() > 0, axis=0)  # Units that the ReLU never makes zero.
        assert network.output_shape == (None, size)
        assert 0.3 < dropped[kept].mean() < 0.7
    plain = train.PROTOCOLS["released"].network((28, 28, 1), 1)
    np.testing.assert_array_equal(plain(x, training=True), plain(x))


@pytest.mark.parametrize("method", ["label", "mc-dropout"])
def test_a_run_is_reproducible_and_resumes(tmp_path, monkeypatch, method):
    settings = {"l2": 1e-4, **ALL[method].options[0]}
    job = {**JOB, "method": method, "settings": settings, "phase": "curve"}
    whole = train.execute(job)
    if method == "label":  # Measuring changes nothing. MC dropout draws masks to predict.
        assert train.execute({**job, "phase": "final"})["measures"] == whole["measures"]
        assert whole["curve"][-1]["test"] == whole["measures"]["(18)"]
    assert len(whole["loss"]) == 4
    assert [point["step"] for point in whole["curve"]] == [6, 12, 18, 24]
    assert whole["curve"][-1]["train"]["NLL"] < whole["curve"][0]["train"]["NLL"]
    clock = SimpleNamespace(monotonic=itertools.count(0, 30).__next__)
    monkeypatch.setattr(train, "time", clock)

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
    assert len(list(tmp_path.iterdir())) == 1
    resumed = train.execute(job, folder=tmp_path)
    assert resumed["steps"] == whole["steps"] == 24
    np.testing.assert_allclose(resumed["loss"], whole["loss"], rtol=1e-6)
    assert resumed["measures"] == whole["measures"]
    assert resumed["curve"] == whole["curve"]
    assert list(tmp_path.iterdir()) == []


def test_a_search_does_not_use_the_test_data(monkeypatch):
    rng = np.random.default_rng(0)
    y = np.arange(800) % 10
    x = (np.eye(10)[y][:, :, None, None] + 0.1 * rng.normal(size=(800, 10, 1, 1))).astype("float32")
    dataset = data.Dataset(x, y, x, (y + 1) % 10)  # Every label of the test data is wrong.
    monkeypatch.setitem(data.LOADERS, "digits", lambda: dataset)
    job = {**JOB, "method": "softmax", "settings": {"l2": 0.0}, "iterations": 120}
    assert train.execute({**job, "phase": "search"})["measures"]["(2)"]["error %"] < 10
    assert train.execute(job)["measures"]["(2)"]["error %"] > 90


def test_calibrated_measures_and_examples_of_no_class(rng, monkeypatch):
    """A temperature of the validation data, and areas under the ROC curve by scikit-learn."""
    y = np.arange(400) % 10
    x = (2 * np.eye(10)[y] + rng.normal(size=(400, 10))).astype("float32")
    dataset = data.Dataset(x, y, x[:200], y[:200], rng.normal(size=(50, 10)).astype("float32"))
    monkeypatch.setitem(data.LOADERS, "digits", lambda: dataset)
    monkeypatch.setitem(train.COLUMNS, "digits", train.Column("digits", 10, 20, 20, 150, 60))
    job = {**JOB, "protocol": "linear", "method": "prior", "settings": {"l2": 0.0}}
    predictions, predict = {}, ALL["prior"].rows["(16)"]
    spy = {"(16)": lambda model, x: predictions.setdefault(len(x), predict(model, x))}
    monkeypatch.setitem(train.ALL, "prior", ALL["prior"]._replace(rows=spy))
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
    job = {**JOB, "method": "softmax", "settings": {"l2": 0.0, "feature_decay": 0.3}}
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
    found = measures.measures_of(certain, np.array([0, 1, 1]))
    assert found["ECE %"] == pytest.approx(100 / 3)


def test_log_probabilities_of_almost_zero_count_fully():
    """-87.3 is the smallest one that the sampled mode and the sparsemax return."""
    smallest = np.log(np.finfo("float32").tiny)
    log_p = np.array([[0.0, smallest], [np.log(0.5), np.log(0.5)]], "float32")
    found = measures.measures_of(log_p, np.array([1, 0]))["NLL"]
    assert found == pytest.approx((-smallest + np.log(2)) / 2, rel=1e-7)
