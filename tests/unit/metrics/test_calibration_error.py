"""The expected calibration error and the reliability of every bin."""

from contextlib import nullcontext

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import softmax

from tf_dropmax import ExpectedCalibrationError

T = 5


def calibrated(count, rng):
    """Logits, and labels drawn from their softmax after they were multiplied by 0.7."""
    logits = rng.normal(size=(count, T)) * 4 * rng.random((count, 1))
    labels = np.array([rng.choice(T, p=row) for row in softmax(0.7 * logits, -1)])
    return logits.astype("float32"), labels


def by_hand(p, labels, weights, bins):
    """Weight, confidence and accuracy, bin by bin and example by example."""
    rows = []
    for b in range(bins):
        sums = np.zeros(3)
        for row, label, weight in zip(p, labels, weights, strict=True):
            if b / bins <= row.max() < (b + 1) / bins or (b == bins - 1 and row.max() >= 1):
                sums += weight * np.array([1, row.max(), row.argmax() == label])
        rows.append([sums[0], *(sums[1:] / sums[0] if sums[0] else (np.nan, np.nan))])
    return np.array(rows).T


def error_of(bins):
    """The calibration error from weight, confidence and accuracy."""
    weight, confidence, accuracy = bins
    return np.nansum(weight * np.abs(confidence - accuracy)) / weight.sum()


def test_bins_agree_with_a_loop(rng):
    logits, labels = calibrated(150, rng)
    weights = rng.random(150).astype("float32")
    p = tf.nn.softmax(logits).numpy()
    cases = [(True, labels, logits + 3), (False, labels[:, None], p), (False, np.eye(T)[labels], p)]
    for from_logits, form, y_pred in cases:
        for weight in (None, weights, weights[:, None]):
            metric = ExpectedCalibrationError(from_logits=from_logits)
            value = float(metric(form, y_pred, weight))
            used = np.ones(150) if weight is None else weights
            expected = by_hand(p, labels, used, bins=15)
            assert value == pytest.approx(error_of(expected), rel=2e-5)
            np.testing.assert_allclose(metric.reliability(), expected, rtol=2e-5)
    assert np.isnan(expected[1]).any()  # Some bins are empty.
    assert float(ExpectedCalibrationError()([0, 0], [[900.0, 0.0], [0.0, 900.0]])) == 0.5


def test_the_result_does_not_depend_on_the_batches(rng):
    logits, labels = calibrated(700, rng)
    p = softmax(logits, -1).astype("float32")
    one, many = (ExpectedCalibrationError(7, from_logits=False) for _ in range(2))
    one.update_state(labels, p)
    for rows in np.split(rng.permutation(700), [1, 40, 300, 300]):
        many.update_state(labels[rows], p[rows])
    np.testing.assert_array_equal(one._sums, many._sums)
    assert float(one.result()) == float(many.result()) > 0.01
    np.testing.assert_array_equal(one.reliability(), many.reliability())
    many.reset_state()
    assert float(many.result()) == 0.0
    assert float(many(labels, p)) == float(one.result())


def test_reliability_without_examples():
    reliability = ExpectedCalibrationError(4).reliability()
    np.testing.assert_array_equal(reliability, [[0] * 4, [np.nan] * 4, [np.nan] * 4])
    assert reliability._fields == ("weight", "confidence", "accuracy")
    assert all((array.dtype, array.shape) == (np.float64, (4,)) for array in reliability)


@pytest.mark.parametrize("replicas", [1, 2])
def test_reliability_after_evaluate(replicas, strategy, rng):
    logits, labels = calibrated(65, rng)  # The last batch has one example.
    with strategy.scope() if replicas == 2 else nullcontext():
        model = keras.Sequential([keras.Input((T,)), keras.layers.Activation("linear")])
        metric = ExpectedCalibrationError(6)
        model.compile(loss="sparse_categorical_crossentropy", metrics=[metric])
    value = model.evaluate(logits, labels, batch_size=32, verbose=0)[1]
    reliability = metric.reliability()
    expected = by_hand(tf.nn.softmax(logits).numpy(), labels, np.ones(65), 6)
    np.testing.assert_allclose(reliability, expected, rtol=1e-5)
    assert value == pytest.approx(error_of(expected), rel=1e-5)


@pytest.mark.parametrize("arguments", [{"bins": 0}, {"bins": 2.0}], ids=str)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ExpectedCalibrationError(**arguments)
