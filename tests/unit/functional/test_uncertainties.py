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
    one = compiled(logits, retain_logits, tf.constant(20_000), tf.constant([1, classes]))
    assert one._fields == ("entropy", "mutual_information", "spread")
    expected = [enumerate_uncertainty(o, r) for o, r in zip(logits, retain_logits, strict=True)]
    by_name = zip(one, zip(*expected, strict=True), [1e-9, 0.03, 0.02], strict=True)
    for value, want, tolerance in by_name:
        np.testing.assert_allclose(value, want, atol=tolerance)
    assert np.min(one.mutual_information) > 0.05


def test_right_on_average_even_with_few_masks(rng):
    """The plain estimate, `H` of the mean draw minus the mean `H`, would be far too small."""
    o, r = rng.normal(size=6), rng.normal(size=6)
    repeated = (np.tile(x, (20_000, 1)) for x in (o, r))
    result = functional.uncertainty(*repeated, samples=2, seed=(3, 4))
    _, information, spread = enumerate_uncertainty(o, r)
    for found, expected in (
        (result.mutual_information, information),
        (result.spread**2, spread**2),
    ):
        bound = 5 * np.std(found, axis=0) / np.sqrt(20_000)
        np.testing.assert_array_less(np.abs(np.mean(found, axis=0) - expected), bound)
        np.testing.assert_array_less(bound, 0.15 * expected)


def test_limits(rng):
    logits = rng.normal(size=(3, 5)).astype("float32")
    certain = functional.uncertainty(logits, tf.fill((3, 5), 1e30))  # the softmax alone
    p = tf.nn.softmax(logits)
    np.testing.assert_allclose(certain.entropy, -np.sum(p * np.log(p), -1), rtol=1e-5)
    for value in (certain.mutual_information, certain.spread):
        np.testing.assert_allclose(value, 0, atol=1e-5)
    none = functional.uncertainty(logits, tf.fill((3, 5), -1e30))  # No class is retained.
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
    compiled = tf.function(lambda x: head.uncertainty(x, samples=5000), jit_compile=True)
    second = compiled(features)
    np.testing.assert_array_equal(head._train_seeds.state, before)
    logits = features.astype("float64") @ head.branches["classes"].kernel.numpy()
    rho = head.retain_probabilities(features).numpy().astype("float64")
    for i, j in np.ndindex(2, 3):
        expected = enumerate_uncertainty(logits[i, j], np.log(rho[i, j] / (1 - rho[i, j])))
        for value, want, tolerance in zip(second, expected, [1e-4, 0.06, 0.04], strict=True):
            np.testing.assert_allclose(value[i, j], want, atol=tolerance)
    again, other = (twin.uncertainty(features, samples=20).spread for _ in range(2))
    np.testing.assert_array_equal(again, first.spread)
    assert np.abs(other - first.spread).max() > 1e-3  # The second call draws the next masks.


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="`samples` must be an int of 1 or more"):
        DropMaxHead(4).uncertainty(np.ones((2, 6), "float32"), 0)
