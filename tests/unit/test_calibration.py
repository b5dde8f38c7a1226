"""`calibrate`: one temperature a mode, fitted by likelihood."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from models import DETERMINISTIC, MODES
from scipy.special import log_softmax

from tf_dropmax import DropMaxHead, DropMaxLoss, calibrate, predict_mode, set_predict_temperature
from tf_dropmax.calibration import best_temperature

START = keras.initializers.RandomNormal(stddev=3.0, seed=3)  # Then a model is far too sure.


def classifier(**kwargs):
    retain = {"kernel_initializer": "glorot_uniform", "bias_initializer": "ones"}
    head = DropMaxHead(4, seed=1, kernel_initializer=START, retain=retain, **kwargs)
    model = keras.Sequential([keras.Input((6,)), head])
    model.compile("sgd", DropMaxLoss())
    return model


@pytest.fixture
def data(rng):
    """Labels that follow the model a little."""
    x = rng.normal(size=(300, 6)).astype("float32")
    best = classifier().predict(x, verbose=0).argmax(-1)
    return x, np.where(rng.random(300) < 0.6, best, rng.integers(4, size=300))


def nll(log_p, y, temperature=1.0, weights=None):
    rows = log_softmax(log_p.astype("float64") / temperature, axis=-1)
    return -np.average(rows[np.arange(len(y)), y], weights=weights)


@pytest.mark.parametrize("mode", DETERMINISTIC)
def test_it_finds_the_best_temperature_and_predictions_use_it(data, mode):
    x, y = data
    model = classifier(predict_mode=mode)
    before = model.predict(x, verbose=0)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(nll(before, y), rel=1e-5)
    temperature = calibrate(model, x, y)
    grid = np.exp(np.linspace(-3, 3, 601))  # steps of 1 %
    losses = [nll(before, y, t) for t in grid]
    assert temperature == pytest.approx(grid[np.argmin(losses)], rel=0.011)
    assert temperature > 1.05
    assert nll(before, y) - min(losses) > 0.005
    assert nll(before, y, temperature) <= min(losses) + 1e-9
    expected = log_softmax(before.astype("float64") / temperature, axis=-1)
    for found in (model.predict(x, verbose=0), model(x), model.predict_on_batch(x)):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(nll(before, y, temperature), rel=1e-5)
    assert model.layers[-1].predict_temperature == pytest.approx(temperature, rel=1e-6)
    again = calibrate(model, x, y)
    assert again == pytest.approx(temperature, rel=1e-6)  # It does not build on the present one.
    set_predict_temperature(model, 1.0)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)


def test_every_mode_has_a_temperature_of_its_own(data):
    x, y = data
    model = classifier()
    found = {}
    for mode in MODES:
        with predict_mode(model, mode, samples=5):
            found[mode] = calibrate(model, x, y)
    assert model.layers[-1].predict_mode == "expected"
    assert len(set(found.values())) == 4
    for mode in MODES:
        with predict_mode(model, mode):
            temperature = model.layers[-1].predict_temperature
            assert temperature == pytest.approx(found[mode], rel=1e-6)


def test_training_does_not_use_it(data):
    x, y = data

    def train(calibrated):
        model = classifier()
        if calibrated:
            assert calibrate(model, x, y) > 1.5
        return model.fit(x, y, epochs=2, shuffle=False, verbose=0).history["loss"]

    assert train(True) == train(False)


def test_files_carry_it(data, tmp_path):
    x, y = data
    model = classifier(predict_mode="exact")
    calibrate(model, x, y)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    model.export(tmp_path / "model", verbose=False)
    model.save_weights(tmp_path / "model.weights.h5")
    tf.train.Checkpoint(model=model).write(tmp_path / "checkpoint")
    by_file, by_checkpoint = classifier(predict_mode="exact"), classifier(predict_mode="exact")
    assert np.abs(by_file(x) - expected).max() > 1e-2
    by_file.load_weights(tmp_path / "model.weights.h5")
    tf.train.Checkpoint(model=by_checkpoint).read(tmp_path / "checkpoint").assert_consumed()
    loaded = keras.models.load_model(tmp_path / "model.keras")
    exported = tf.saved_model.load(tmp_path / "model")
    for each in (loaded, exported.serve, by_file, by_checkpoint):
        np.testing.assert_allclose(each(x), expected, atol=1e-5)


class Batches(keras.utils.PyDataset):
    def __init__(self, *arrays):
        super().__init__()
        self.arrays = arrays

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return tuple(array[30 * index : 30 * index + 30] for array in self.arrays)


class Counted(Batches):
    """It says how many batches it has, in place of a length."""

    __len__ = None
    num_batches = 10


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")  # the generator
def test_forms_of_data(data, rng):
    x, y = data
    expected = calibrate(classifier(), x, y)
    shuffled = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(300).batch(64)
    for arguments in [
        (tf.constant(x), tf.constant(y)),
        (Counted(x, y),),
        (x, y[:, None]),
        (x, np.eye(4)[y]),
        (x, y, np.full(300, 2.0)),
        (x, y, None, 7),
        (shuffled,),
        (Batches(x, y),),
        (Batches(x, y, np.ones(300)),),
        ((part for part in zip(np.split(x, 3), np.split(y, 3), strict=True)),),
    ]:
        assert calibrate(classifier(), *arguments) == pytest.approx(expected, rel=1e-5)
    weights = rng.integers(3, size=300)
    weighted = calibrate(classifier(), x, y, weights)
    kept = np.repeat(np.arange(300), weights)
    assert weighted == pytest.approx(calibrate(classifier(), x[kept], y[kept]), rel=1e-5)
    assert abs(weighted - expected) > 1e-3
    by_batches = calibrate(classifier(), Batches(x, y, weights))
    assert by_batches == pytest.approx(weighted, rel=1e-5)


def test_soft_labels_sequences_and_several_inputs(rng):
    a, b = rng.normal(size=(2, 40, 5, 3)).astype("float32")
    inputs = [keras.Input((5, 3)), keras.Input((5, 3))]
    outputs = DropMaxHead(4, kernel_initializer=START)(keras.layers.Add()(inputs))
    model = keras.Model(inputs, outputs)
    log_p = model.predict([a, b], verbose=0).reshape(-1, 4).astype("float64")
    soft = 0.8 * np.exp(log_softmax(log_p / 3, axis=-1)) + 0.2 * rng.dirichlet(np.ones(4), size=200)
    weights = rng.random((40, 5))
    temperature = calibrate(model, [a, b], soft.reshape(40, 5, 4), weights)

    def loss(t):
        rows = -np.sum(soft * log_softmax(log_p / t, axis=-1), axis=-1)
        return np.average(rows, weights=weights.ravel())

    grid = np.exp(np.linspace(-3, 5, 801))
    assert temperature == pytest.approx(grid[np.argmin([loss(t) for t in grid])], rel=0.011)


def bad_data(x, y):
    broken = np.where(np.arange(300)[:, None] == 5, np.nan, x)
    ones = np.ones(300)
    return {
        "features": ((broken, y), "Expected finite log-probabilities"),
        "infinite weight": ((x, y, np.where(ones == 1, np.inf, 0)), "finite labels and weights"),
        "no weight": ((x, y, 0 * ones), "positive weights"),
        "negative": ((x, y, np.where(np.arange(300) == 3, -1.0, 1.0)), "labels and weights >= 0"),
        "nan": ((x, np.where(np.arange(4) == y[:, None], np.nan, 0.0)), "Expected finite"),
        "no labels": ((x,), "Expected labels: `y`, or batches"),
        "batches without labels": ((Batches(x),), "Expected labels"),
        "number": ((x, y[:5]), "cardinality"),  # Keras's own message
        "strings": ((x, y.astype(str)), "labels that are numbers"),
        "weights beside a data set": ((Batches(x, y), None, ones), "beside arrays only"),
        "weights": ((x, y, ones[:, None] * np.ones(3)), "shape"),
        "one class": ((x, 0 * y), r"2 classes or more.*Received: labels \[0\]"),
        "no errors": ((x, classifier()(x).numpy().argmax(1)), "no errors.*Received: 300 examples"),
        "out of range": ((x, y + 1), "whole numbers"),
        "half": ((x, y + 0.5), "whole numbers"),
    }


@pytest.mark.parametrize("case", bad_data(np.zeros((300, 6)), np.zeros(300, int)))
def test_bad_data_leaves_the_model_as_it_was(data, case):
    model = classifier()
    set_predict_temperature(model, 3.0)
    before = model.predict(data[0], verbose=0)
    arguments, message = bad_data(*data)[case]
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=message):
        calibrate(model, *arguments)
    assert model.layers[-1].predict_temperature == 3.0
    np.testing.assert_array_equal(model.predict(data[0], verbose=0), before)


def test_models_that_cannot_be_calibrated(data):
    x, y = data
    inputs = keras.Input((6,))
    head = DropMaxHead(4)
    plain = keras.Sequential([inputs, keras.layers.Dense(4)])
    two = keras.Model(inputs, [DropMaxHead(4)(inputs), DropMaxHead(4)(inputs)])
    outputs = keras.Model(inputs, {"a": head(inputs), "b": head(inputs, output="logits")})
    for model, message in [
        (plain, "at least one DropMaxHead"),
        (DropMaxHead(4), r"Expected a keras\.Model.*of type DropMaxHead"),
        (two, "one DropMaxHead.*which has 2"),
        (outputs, "one output"),
        (keras.Sequential([classifier(), keras.layers.Softmax()]), "log-probabilities"),
    ]:
        with pytest.raises(ValueError, match=message):
            calibrate(model, x, y)
    for temperature in (0, 0.009, 101, -1.0, np.nan, np.inf, "2", None):
        with pytest.raises(ValueError, match=r"temperature` must be.*Received"):
            set_predict_temperature(outputs, temperature)


def test_nothing_is_traced_anew(data):
    model = classifier()
    set_predict_temperature(model, 3.0)
    model.predict(data[0], verbose=0)
    function, call = model.predict_function, model.layers[-1].call
    temperature = calibrate(model, *data)
    assert temperature == pytest.approx(calibrate(classifier(), *data), rel=1e-4)
    assert model.predict_function is function
    model.layers[-1].call = None  # Tracing the head again would fail.
    scaled = model.predict(data[0], verbose=0)
    model.layers[-1].call = call
    np.testing.assert_allclose(scaled, model(data[0]), atol=1e-5)


@given(
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    rows=st.integers(2, 30),
    classes=st.integers(2, 6),
)
def test_it_is_never_worse_than_no_temperature(seed, scale, rows, classes):
    draw = np.random.default_rng(seed)
    logits = scale * draw.normal(size=(rows, classes))
    y = draw.integers(classes, size=rows)
    y[:2] = 0, 1
    temperature = best_temperature(logits, y)
    assert 0.01 <= temperature <= 100
    assert nll(logits, y, temperature) <= nll(logits, y) * (1 + 1e-9)


def test_two_replicas_see_every_example_once(strategy, data):
    x, y = data
    expected = calibrate(classifier(), x, y)
    with strategy.scope():
        model = classifier()
    assert calibrate(model, x, y, batch_size=75) == pytest.approx(expected, rel=1e-5)


def test_labels_without_weight_may_be_anything(rng):
    x, y = rng.normal(size=(40, 5, 6)).astype("float32"), rng.integers(4, size=(40, 5))
    model = keras.Sequential([keras.Input((None, 6)), DropMaxHead(4, kernel_initializer=START)])
    expected = calibrate(model, x[:, :3], y[:, :3])
    weights, dense, padded = np.ones((40, 5)), np.eye(4)[y], y.copy()
    weights[:, 3:], dense[:, 3:], padded[:, 3:] = 0, -1, -1
    for arguments in ((padded, weights), (padded, weights[..., None]), (dense, weights)):
        assert calibrate(model, x, *arguments) == pytest.approx(expected, rel=1e-5)
