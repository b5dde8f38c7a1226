import itertools

import numpy as np
import pytest
import tensorflow as tf
from models import GLOROT
from oracles import sigmoid

from tf_dropmax import DropMaxHead, functional


def enumerate_uncertainty(o, r):
    """Entropy, mutual information and spread of one row, by all 2^T masks."""
    classes, rho = len(o), sigmoid(r)
    weights, rows = [], []
    for mask in itertools.product([False, True], repeat=classes):
        mask = np.array(mask)
        w = np.where(mask, np.exp(o - o[mask].max()), 0) if mask.any() else np.ones(classes)
        weights.append(np.prod(np.where(mask, rho, 1 - rho)))
        rows.append(w / w.sum())
    weights, rows = np.array(weights), np.array(rows)
    mean = weights @ rows
    entropies = [-sum(p * np.log(p) for p in row if p > 0) for row in rows]
    entropy = -sum(p * np.log(p) for p in mean if p > 0)
    return entropy, entropy - weights @ entropies, np.sqrt(weights @ (rows - mean) ** 2)


@pytest.mark.parametrize(
    ("classes", "jit_compile"), [(2, False), (3, False), (8, False), (8, True)]
)
def test_agrees_with_the_enumeration_of_all_masks(classes, jit_compile, rng):
    logits, retain_logits = 3 * rng.normal(size=(4, classes)), 2 * rng.normal(size=(4, classes))
    compiled = tf.function(functional.uncertainty, jit_compile=jit_compile)
    one = compiled(
        tf.constant(logits),
        tf.constant(retain_logits),
        tf.constant(20_000),
        tf.constant([1, classes]),
    )
    assert one._fields == ("entropy", "mutual_information", "spread")
    expected = [enumerate_uncertainty(o, r) for o, r in zip(logits, retain_logits, strict=True)]
    for value, want, tolerance in zip(
        one, zip(*expected, strict=True), [1e-9, 0.03, 0.02], strict=True
    ):
        np.testing.assert_allclose(value, want, atol=tolerance)
    assert np.min(one.mutual_information) > 0.05


def test_right_on_average_even_with_few_masks(rng):
    """The plain estimate, `H` of the mean draw minus the mean `H`, would be far too small."""
    o, r = rng.normal(size=6), rng.normal(size=6)
    rows = 20_000
    result = functional.uncertainty(
        np.tile(o, (rows, 1)), np.tile(r, (rows, 1)), samples=2, seed=(3, 4)
    )
    _, mutual_information, spread = enumerate_uncertainty(o, r)
    values = result.mutual_information.numpy()
    assert (
        abs(values.mean() - mutual_information)
        < 5 * values.std() / np.sqrt(rows)
        < 0.1 * mutual_information
    )
    squares = np.square(result.spread.numpy())
    np.testing.assert_array_less(
        np.abs(squares.mean(0) - spread**2), 5 * squares.std(0) / np.sqrt(rows)
    )


def test_limits(rng):
    logits = rng.normal(size=(3, 5)).astype("float32")
    certain = functional.uncertainty(
        logits, tf.fill((3, 5), 1e30)
    )  # every class retained: the softmax alone
    p = tf.nn.softmax(logits)
    np.testing.assert_allclose(certain.entropy, -np.sum(p * np.log(p), -1), rtol=1e-5)
    for value in (certain.mutual_information, certain.spread):
        np.testing.assert_allclose(value, 0, atol=1e-5)
    none = functional.uncertainty(logits, tf.fill((3, 5), -1e30))  # no class retained: uniform
    np.testing.assert_allclose(none.entropy, np.log(5), rtol=1e-5)
    wide = functional.uncertainty(1e30 * logits, 30 * logits, samples=7)
    assert all(np.isfinite(value).all() for value in wide)
    assert (wide.mutual_information.numpy() >= 0).all()
    logits[1, 2] = np.nan
    broken = functional.uncertainty(logits, tf.zeros((3, 5)))
    for value in broken:
        assert np.isnan(value[1]).all()
        assert np.isfinite(value[0]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_never_negative(dtype, rng):
    """With almost certain masks, the information is as small as the rounding."""
    logits, retain_logits = rng.normal(size=(300, 9)).astype(dtype), np.full((300, 9), 12.0, dtype)
    result = functional.uncertainty(logits, retain_logits, samples=3)
    assert result.mutual_information.dtype == dtype
    assert np.min(result.mutual_information) >= 0


@pytest.mark.parametrize(
    "kwargs", [{}, {"retain_probability": 0.4}, {"posterior": "label"}], ids=str
)
def test_of_a_head(kwargs, rng):
    features = rng.normal(size=(2, 3, 6)).astype("float32")
    head, twin = (DropMaxHead(4, seed=5, retain=GLOROT, **kwargs) for _ in range(2))
    first = head.uncertainty(features, samples=20)
    assert [tuple(value.shape) for value in first] == [(2, 3), (2, 3), (2, 3, 4)]
    before = head._train_seeds.state.numpy()
    second = tf.function(lambda x: head.uncertainty(x, samples=5000), jit_compile=True)(
        tf.constant(features)
    )
    np.testing.assert_array_equal(head._train_seeds.state, before)
    logits = features.astype("float64") @ head.branches["classes"].kernel.numpy()
    rho = head.retain_probabilities(features).numpy().astype("float64")
    for i, j in np.ndindex(2, 3):
        expected = enumerate_uncertainty(logits[i, j], np.log(rho[i, j] / (1 - rho[i, j])))
        for value, want, tolerance in zip(second, expected, [1e-4, 0.06, 0.04], strict=True):
            np.testing.assert_allclose(value[i, j], want, atol=tolerance)
    again = twin.uncertainty(features, samples=20)
    np.testing.assert_array_equal(again.spread, first.spread)
    assert (
        np.abs(twin.uncertainty(features, samples=20).spread - first.spread).max() > 1e-3
    )  # the next masks


def test_wrong_arguments():
    head = DropMaxHead(4)
    for features, samples, message in [
        (np.ones((2, 6), "float32"), 0, "`samples` must be an int >= 1"),
        (np.ones((2, 7), "float32"), 5, "axis -1 of input shape to have value 6"),
    ]:
        head.uncertainty(np.ones((2, 6), "float32"), samples=1)
        with pytest.raises(ValueError, match=message):
            head.uncertainty(features, samples)
