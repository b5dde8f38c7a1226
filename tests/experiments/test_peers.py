"""The methods that DropMax is compared with, against their formulas."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import log_softmax

from tf_dropmax.calibration import best_temperature
from tf_dropmax.experiments import peers, systems


@pytest.fixture
def problem(rng):
    logits = rng.normal(size=(40, 5)).astype("float32") * 3
    labels = rng.integers(5, size=40)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return logits, labels, p


def test_label_smoothing(problem):
    logits, labels, p = problem
    rows = zip(p, labels, strict=True)
    expected = np.mean([-0.9 * np.log(row[y]) - 0.1 * np.log(row).mean() for row, y in rows])
    loss = peers.smoothed_cross_entropy(0.1)
    for shape in [(40,), (40, 1)]:  # Keras passes labels in both.
        found = loss(labels.reshape(shape), tf.constant(logits))
        assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 3.0])
def test_focal_loss(problem, gamma):
    logits, labels, p = problem
    rows = zip(p, labels, strict=True)
    expected = [-((1 - row[y]) ** gamma) * np.log(row[y]) for row, y in rows]
    found = peers.focal_loss(gamma)(labels, tf.constant(logits))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_temperature_scaling(problem):
    logits, _, _ = problem
    rows = enumerate(_softmax(logits / 4))
    calm = np.array([np.random.default_rng(row).choice(5, p=p) for row, p in rows])
    found = best_temperature(logits, calm)
    grid = np.geomspace(0.05, 20, 4000)
    losses = [-log_softmax(logits / t, axis=-1)[np.arange(40), calm].mean() for t in grid]
    assert found == pytest.approx(grid[np.argmin(losses)], rel=0.01)
    assert found > 1.5


def _softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_mc_dropout_averages_probabilities_over_masks(rng):
    x = rng.normal(size=(7, 6)).astype("float32")
    head, _ = systems.PEERS["mc-dropout"].build(3, 1, 0.0, rate=0.5)
    initializer = keras.initializers.GlorotUniform(seed=2)
    hidden = keras.layers.Dense(2, kernel_initializer=initializer)
    model = keras.Sequential([keras.Sequential([keras.Input((6,)), hidden]), head])
    weights = [w.numpy() for w in (*model.layers[0].weights, *head.layers[1].weights)]
    features = x @ weights[0] + weights[1]
    expected = 0  # Over all four masks of two features.
    for mask in [(0, 0), (0, 2), (2, 0), (2, 2)]:
        expected += _softmax(features * np.array(mask) @ weights[2] + weights[3]) / 4
    found = np.exp(systems.PEERS["mc-dropout"].rows["S=100"](model, x))
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    means = [np.exp(systems._mean_over_dropout(count, model, x)) for count in (1, 400)]
    errors = [np.abs(mean - expected).mean() for mean in means]
    assert errors[1] < errors[0] / 5
    assert errors[1] < 0.02


def test_heteroscedastic_head(rng):
    """The mean of the softmax over other draws of the noise. Without noise it is the softmax."""
    x = rng.normal(size=(3, 4)).astype("float32")
    head = peers.HeteroscedasticHead(5, temperature=0.5, factors=2, samples=20_000, seed=1)
    found = np.exp(head(x))
    mean, factors, scale = (x @ branch.kernel.numpy() for branch in head.branches)
    for row in range(3):
        covariance = np.diag(np.log1p(np.exp(scale[row])) ** 2)
        covariance += factors[row].reshape(5, 2) @ factors[row].reshape(5, 2).T
        draws = rng.multivariate_normal(mean[row], covariance, size=20_000)
        np.testing.assert_allclose(found[row], _softmax(draws / 0.5).mean(0), atol=0.015)
    assert np.abs(found - _softmax(mean / 0.5)).max() > 0.05
    head.branches[1].kernel.assign(0 * head.branches[1].kernel)
    head.branches[2].kernel.assign(0 * head.branches[2].kernel)
    head.branches[2].bias.assign(np.full(5, -50.0))
    np.testing.assert_allclose(np.exp(head(x)), _softmax(mean / 0.5), atol=1e-5)
