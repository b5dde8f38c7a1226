"""What all metrics have in common, the negative log-likelihood and the Brier score."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.testing import TestCase
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss

import tf_dropmax

T = 5
PROBABILITY_METRICS = ["NegativeLogLikelihood", "BrierScore", "ExpectedCalibrationError"]
RETAIN_METRICS = ["TargetRetainProbability", "NonTargetRetainProbability", "RetainedClasses"]


def metric(name, /, **kwargs):
    return getattr(tf_dropmax, name)(**kwargs)


def scikit_learn(name, p, labels, weights):
    p = p.astype("float64") / p.sum(-1, keepdims=True, dtype="float64")
    if name == "NegativeLogLikelihood":
        return log_loss(labels, p, sample_weight=weights, labels=range(T))
    return brier_score_loss(labels, p, sample_weight=weights, labels=range(T), scale_by_half=False)


@pytest.mark.parametrize("name", PROBABILITY_METRICS[:2])
def test_agree_with_scikit_learn(name, rng):
    logits, labels = (4 * rng.normal(size=(150, T))).astype("float32"), rng.integers(T, size=150)
    weights = rng.random(150).astype("float32")
    p = tf.nn.softmax(logits).numpy()
    one_hot = np.eye(T, dtype=int)[labels]
    cases = [(True, labels, logits + 3), (True, labels, tf.nn.log_softmax(logits))]
    cases += [
        (False, form, p) for form in (labels, labels[:, None], one_hot, one_hot.astype("float32"))
    ]
    for from_logits, form, y_pred in cases:
        for weight in (None, weights, weights[:, None]):
            value = float(metric(name, from_logits=from_logits)(form, y_pred, weight))
            expected = scikit_learn(name, p, labels, np.ones(150) if weight is None else weights)
            assert value == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("name", [*PROBABILITY_METRICS[:2], *RETAIN_METRICS])
def test_soft_labels_weigh_the_classes(name, rng):
    p, soft = softmax(rng.normal(size=(1, T)), -1), softmax(rng.normal(size=(1, T)), -1)
    arguments = {} if name in RETAIN_METRICS else {"from_logits": False}
    expected = sum(soft[0, k] * float(metric(name, **arguments)([k], p)) for k in range(T))
    assert float(metric(name, **arguments)(soft, p)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*PROBABILITY_METRICS, *RETAIN_METRICS])
def test_a_nan_in_the_predictions_gives_nan(name):
    assert np.isnan(float(metric(name)([0, 0], [[0.5, 0.5], [np.nan, 0.5]])))


@pytest.mark.parametrize("name", [*PROBABILITY_METRICS, *RETAIN_METRICS])
@pytest.mark.parametrize("steps", [4, 10])
def test_sequences_with_weights_and_a_mask(name, steps, rng):
    p, labels = rng.random((10, steps, T)), rng.integers(T, size=(10, steps))
    p = (p / p.sum(-1, keepdims=True)).astype("float32")
    weights, mask = rng.random(10).astype("float32"), rng.random((10, steps)) < 0.5
    masked = tf.constant(p)
    masked._keras_mask = tf.constant(mask)
    arguments = {} if name in RETAIN_METRICS else {"from_logits": False}
    sequences, rows = (metric(name, **arguments) for _ in range(2))
    expected = float(rows(labels[mask], p[mask], np.repeat(weights, steps)[mask.ravel()]))
    assert float(sequences(labels, masked, weights)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*PROBABILITY_METRICS, *RETAIN_METRICS])
def test_config_round_trip(name):
    arguments = {"name": "other", "dtype": "float64"}
    arguments |= {} if name in RETAIN_METRICS else {"from_logits": False}
    arguments |= {"bins": 3} if name == "ExpectedCalibrationError" else {}
    one = metric(name, **arguments)
    assert one.get_config() == arguments
    for each in (one, metric(name)):
        TestCase().run_class_serialization_test(each)


@pytest.mark.parametrize("name", PROBABILITY_METRICS)
def test_callbacks_of_keras_know_that_less_is_better(name, blobs):
    one, model = metric(name), keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=[one])
    stop = keras.callbacks.EarlyStopping(f"val_{one.name}", patience=0)
    x, y = blobs
    model.evaluate(x, y, verbose=0)
    stop.set_model(model)
    stop.on_train_begin()
    for epoch, value in enumerate([0.5, 0.4, 0.6]):
        assert not model.stop_training
        stop.on_epoch_end(epoch, {f"val_{one.name}": value})
    assert model.stop_training
    assert stop.best == 0.4


@pytest.mark.parametrize("name", [*PROBABILITY_METRICS, *RETAIN_METRICS])
@pytest.mark.parametrize("wrong", [[[-0.7, -0.7]], [[1.5, 0.5]]], ids=str)
def test_values_outside_0_and_1_raise(name, wrong):
    arguments = {} if name in RETAIN_METRICS else {"from_logits": False}
    message = rf"{name}: `y_pred` must be in \[0, 1\]"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        metric(name, **arguments)([0], tf.constant(wrong))


def test_probabilities_of_zero_and_of_minus_infinity():
    logits = [[0.0, -np.inf]]
    assert float(metric("NegativeLogLikelihood")([0], logits)) == 0.0
    assert float(metric("BrierScore")([1], logits)) == 2.0
    value = metric("NegativeLogLikelihood", from_logits=False)([[0.0, 1.0]], [[1.0, 0.0]])
    assert float(value) == pytest.approx(87.34, abs=0.01)
