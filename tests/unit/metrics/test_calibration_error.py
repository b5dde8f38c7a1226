"""The expected calibration error and the reliability of every bin."""

from contextlib import nullcontext

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import softmax

from tf_dropmax import ExpectedCalibrationError

T = 5


def calibrated(count, rng, sharpness=4.0):
    """Logits, and labels drawn from their softmax after they were multiplied by 0.7."""
    logits = rng.normal(size=(count, T)) * sharpness * rng.random((count, 1))
    labels = np.array([rng.choice(T, p=row) for row in softmax(0.7 * logits, -1)])
    return logits.astype("float32"), labels


def equal_width(p, labels, weights, bins):
    """Weight, confidence and accuracy, bin by bin and example by example."""
    rows = []
    for b in range(bins):
        sums = np.zeros(3)
        for row, label, weight in zip(p, labels, weights, strict=True):
            if b / bins <= row.max() < (b + 1) / bins or (b == bins - 1 and row.max() >= 1):
                sums += weight * np.array([1, row.max(), row.argmax() == label])
        rows.append([sums[0], *(sums[1:] / sums[0] if sums[0] else (np.nan, np.nan))])
    return np.array(rows).T


def equal_mass(p, labels, weights, bins):
    """The same for bins of sorted examples. An example in which a bin ends is divided."""
    order = np.argsort(p.max(-1), kind="stable")
    p, labels, weights = p[order].astype("float64"), labels[order], weights[order]
    ends = np.append(0, np.cumsum(weights))
    edges = np.linspace(0, ends[-1], bins + 1)
    values = (np.ones(len(p)), p.max(-1), p.argmax(-1) == labels)
    sums = [
        np.diff(np.interp(edges, ends, np.append(0, np.cumsum(weights * value))))
        for value in values
    ]
    return np.array([sums[0], sums[1] / sums[0], sums[2] / sums[0]])


def documented_bound(p, weights, bins):
    """The largest error with `binning="mass"` that the documentation allows."""
    order = np.argsort(p.max(-1), kind="stable")
    confidence, weights = p[order].max(-1).astype("float64"), weights[order]
    ends = np.append(0, np.cumsum(weights))
    with np.errstate(divide="ignore"):
        position = (np.log(confidence / (1 - confidence)) + 16) * 64
    cells = np.clip(np.floor(position), 0, 2047)
    bound = 0.0
    for edge in np.linspace(0, ends[-1], bins + 1)[1:-1]:
        at = min(np.searchsorted(ends, edge, side="right") - 1, len(cells) - 1)
        bound += 0.51 * weights[cells == cells[at]].sum() / ends[-1]
    return bound


def error_of(bins):
    """The calibration error from weight, confidence and accuracy."""
    weight, confidence, accuracy = bins
    return np.nansum(weight * np.abs(confidence - accuracy)) / weight.sum()


def test_equal_width_bins_agree_with_a_loop(rng):
    logits, labels = calibrated(150, rng)
    weights = rng.random(150).astype("float32")
    p = tf.nn.softmax(logits).numpy()
    cases = [(True, labels, logits + 3), (False, labels[:, None], p), (False, np.eye(T)[labels], p)]
    for from_logits, form, y_pred in cases:
        for weight in (None, weights, weights[:, None]):
            metric = ExpectedCalibrationError(from_logits=from_logits)
            value = float(metric(form, y_pred, weight))
            used = np.ones(150) if weight is None else weights
            expected = equal_width(p, labels, used, bins=15)
            assert value == pytest.approx(error_of(expected), rel=2e-5)
            np.testing.assert_allclose(metric.reliability(), expected, rtol=2e-5)
    assert np.isnan(expected[1]).any()  # Some bins are empty.


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_the_result_does_not_depend_on_the_batches(binning, rng):
    logits, labels = calibrated(700, rng)
    p = softmax(logits, -1).astype("float32")
    one, many = (ExpectedCalibrationError(7, binning, from_logits=False) for _ in range(2))
    one.update_state(labels, p)
    for rows in np.split(rng.permutation(700), [1, 40, 300, 300]):
        many.update_state(labels[rows], p[rows])
    np.testing.assert_array_equal(one._sums, many._sums)
    assert float(one.result()) == float(many.result()) > 0.01
    np.testing.assert_array_equal(one.reliability(), many.reliability())
    many.reset_state()
    assert float(many.result()) == 0.0
    assert float(many(labels, p)) == float(one.result())


@pytest.mark.parametrize("bins", [15, 4])
@pytest.mark.parametrize("sharpness", [1, 4, 40])
def test_the_error_of_equal_mass_bins_is_within_the_documented_bound(bins, sharpness, rng):
    logits, labels = calibrated(2000, rng, sharpness)
    p = tf.nn.softmax(logits).numpy()
    for weights in (np.ones(2000, "float32"), rng.random(2000).astype("float32")):
        metric = ExpectedCalibrationError(bins, "mass")
        value = float(metric(labels, logits, weights))
        expected = error_of(equal_mass(p, labels, weights, bins))
        assert abs(value - expected) <= documented_bound(p, weights, bins) + 1e-6
        assert abs(value - expected) < 0.005  # In practice it is much smaller than the bound.
        assert expected > 0.01
        weight, confidence, _ = reliability = metric.reliability()
        assert value == pytest.approx(error_of(reliability), rel=1e-6)
        np.testing.assert_allclose(weight, weights.sum(dtype="float64") / bins, rtol=1e-9)
        assert (np.diff(confidence) >= 0).all()


@pytest.mark.parametrize("bins", [2, 5, 3, 1])
def test_equal_mass_bins_are_exact_with_one_example_in_a_cell(bins):
    p = np.linspace(0.51, 0.99, 10)[:, None]
    p = np.hstack([p, 1 - p])
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 0, 1, 0])
    metric = ExpectedCalibrationError(bins, "mass", from_logits=False)
    expected = equal_mass(p, labels, np.ones(10), bins)
    assert float(metric(labels, p)) == pytest.approx(error_of(expected), rel=1e-6)
    np.testing.assert_allclose(metric.reliability(), expected, rtol=1e-6)


def test_equal_mass_bins_divide_equal_examples_evenly():
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 0, 1, 0])  # 6 of 10 are right.
    metric = ExpectedCalibrationError(4, "mass", from_logits=False)
    assert float(metric(labels, np.tile([[0.8, 0.2]], (10, 1)))) == pytest.approx(0.2)
    expected = np.repeat([[2.5], [0.8], [0.6]], 4, axis=1)
    np.testing.assert_allclose(metric.reliability(), expected, rtol=1e-6)
    sure = [[900.0, 0.0], [0.0, 900.0]]
    assert float(ExpectedCalibrationError(binning="mass")([0, 0], sure)) == 0.5


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_reliability_without_examples(binning):
    reliability = ExpectedCalibrationError(4, binning).reliability()
    np.testing.assert_array_equal(reliability, [[0] * 4, [np.nan] * 4, [np.nan] * 4])
    assert reliability._fields == ("weight", "confidence", "accuracy")
    assert all((array.dtype, array.shape) == (np.float64, (4,)) for array in reliability)


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_sequences_with_weights_and_a_mask(binning, rng):
    logits, labels = calibrated(40, rng)
    weights, mask = rng.random(10).astype("float32"), rng.random((10, 4)) < 0.5
    masked = tf.reshape(logits, (10, 4, T))
    masked._keras_mask = tf.constant(mask)
    kept = mask.ravel()
    sequences, rows = (ExpectedCalibrationError(binning=binning) for _ in range(2))
    expected = float(rows(labels[kept], logits[kept], np.repeat(weights, 4)[kept]))
    assert float(sequences(labels.reshape(10, 4), masked, weights)) == pytest.approx(expected)
    np.testing.assert_allclose(sequences.reliability(), rows.reliability(), rtol=1e-6)


@pytest.mark.parametrize("replicas", [1, 2])
def test_reliability_after_evaluate(replicas, strategy, rng):
    logits, labels = calibrated(65, rng)  # The last batch has one example.
    with strategy.scope() if replicas == 2 else nullcontext():
        model = keras.Sequential([keras.Input((T,)), keras.layers.Activation("linear")])
        metric = ExpectedCalibrationError(6)
        model.compile(loss="sparse_categorical_crossentropy", metrics=[metric])
    value = model.evaluate(logits, labels, batch_size=32, verbose=0)[1]
    reliability = metric.reliability()
    expected = equal_width(tf.nn.softmax(logits).numpy(), labels, np.ones(65), 6)
    np.testing.assert_allclose(reliability, expected, rtol=1e-5)
    assert value == pytest.approx(error_of(expected), rel=1e-5)


@pytest.mark.parametrize("arguments", [{"bins": 0}, {"bins": 2.0}, {"binning": "mas"}], ids=str)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ExpectedCalibrationError(**arguments)
