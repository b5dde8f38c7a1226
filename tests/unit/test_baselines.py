"""Sparsemax and sampled softmax: the functions, and the losses on plain logits."""

import keras
import numpy as np
import oracles
import pytest
import tensorflow as tf
from keras.src.testing import TestCase
from scipy import stats

from tf_dropmax import DropMaxLoss, SampledSoftmaxLoss, SparsemaxLoss, functional, sparsemax
from tf_dropmax.baselines import sampled_softmax_scores, sparsemax_scores


def value_and_gradient(function, x):
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return value.numpy(), tape.gradient(value, x).numpy()


def test_sparsemax_is_the_projection_onto_the_simplex(rng):
    logits = np.concatenate([scale * rng.normal(size=(20, 5)) for scale in (0, 0.1, 1, 10)])
    expected = [oracles.project_onto_simplex(z) for z in logits]
    np.testing.assert_allclose(sparsemax(logits), expected, atol=1e-12)

    def second(z):
        return tf.reduce_sum(sparsemax(z)[:, 1])

    _, gradient = value_and_gradient(second, logits[20:60])
    reference = oracles.central_differences(second, logits[20:60], 1e-7)
    np.testing.assert_allclose(gradient, reference, atol=1e-6)


def definition_of_sparsemax_loss(z):
    """For every label y: -z_y + max over the simplex of (p z - |p|^2 / 2) + 1/2."""
    p = oracles.project_onto_simplex(z)
    return -z + p @ z - p @ p / 2 + 0.5


def test_sparsemax_scores_are_minus_the_loss(rng):
    """The gradient of the loss is the projection minus the one-hot label."""
    logits = np.concatenate([rng.normal(size=(20, 5)) * scale for scale in (0.1, 1, 10)])
    scores, gradient = value_and_gradient(sparsemax_scores, logits)
    for row, z in enumerate(logits):
        np.testing.assert_allclose(-scores[row], definition_of_sparsemax_loss(z), atol=1e-12)
        summed = 1 - 5 * oracles.project_onto_simplex(z)
        np.testing.assert_allclose(gradient[row], summed, atol=1e-12)


def test_sampled_softmax_is_a_softmax_over_target_and_sample(rng):
    logits, uniform = rng.normal(size=(4, 6)), rng.uniform(size=6)
    q = rng.dirichlet(np.ones(6))
    for size in range(1, 6):
        scores = sampled_softmax_scores(logits, q, uniform, size)
        arrival = -np.log(uniform) / q
        sample = np.argsort(arrival)[:size]
        corrected = logits - np.log(1 - np.exp(-q * np.sort(arrival)[size]))
        for row in range(4):
            for y in range(6):
                competing = sorted({y, *sample})
                expected = corrected[row, y] - np.log(np.sum(np.exp(corrected[row, competing])))
                assert scores[row, y].numpy() == pytest.approx(expected, rel=1e-9)


def test_sampled_softmax_draws_from_its_distribution(rng):
    """Class t arrives first with probability Q_t. Chi-square test of 20,000 draws, fixed seed."""
    q = np.array([0.5, 0.3, 0.15, 0.05])
    uniform = functional.uniform_draws((20_000, 4), (1, 2), "float64")
    zeros = np.zeros((1, 4))
    sampled = tf.vectorized_map(lambda u: sampled_softmax_scores(zeros, q, u, 1), uniform)
    # If the sampled class is the target, no other class takes part and its score is 0.
    counts = np.bincount(sampled.numpy()[:, 0].argmax(-1), minlength=4)
    assert stats.chisquare(counts, 20_000 * q).pvalue > 1e-4


EXTREMES = [0.0, 1.0, -20.0, 90.0, -1e4, 1e4, 3e8, 1.5e9, -2e9, 1e30, -1e30]


@pytest.mark.parametrize("classes", [1, 2, 3, 300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("function", [sparsemax, sparsemax_scores])
def test_finite_up_to_the_promised_magnitude(rng, classes, dtype, function):
    """Values and gradients, with every sign and size of logits."""
    logits = rng.choice(EXTREMES, size=(30, classes)).astype(dtype)
    logits[2] = 0.0
    values = {}

    def total(x):
        values["all"] = function(x)
        # In half of the rows one score has a gradient, in the other half all scores have one.
        parts = (values["all"][::2, 0], values["all"][1::2])
        return sum(tf.reduce_sum(part / 1e30) * 1e30 for part in parts)

    _, gradient = value_and_gradient(total, logits)
    assert np.isfinite(values["all"]).all()
    assert np.isfinite(gradient).all()


LOGITS = np.array([[2.0, 1.5, -1.0], [0.1, 0.2, 0.3]], "float32")


def test_sparsemax_loss():
    losses = [definition_of_sparsemax_loss(row.astype("float64")) for row in LOGITS]
    expected = (losses[0][1] + losses[1][2]) / 2
    for labels in (np.array([1, 2]), np.eye(3)[[1, 2]]):
        assert SparsemaxLoss()(labels, LOGITS).numpy() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sampler", ["uniform", "learned_unigram"])
def test_sampled_softmax_loss(sampler):
    logits = np.tile(np.linspace(0, 1, 10, dtype="float32"), (4, 1))
    values = [
        float(SampledSoftmaxLoss(0.4, sampler, seed=s)(np.arange(4), logits)) for s in range(30)
    ]
    full = float(DropMaxLoss()(np.arange(4), functional.softmax_log_probabilities(logits)))
    assert len(set(values)) > 20
    assert all(np.log(2) < value < full for value in values)
    loss = SampledSoftmaxLoss(0.4, sampler, seed=5)
    assert float(loss(np.arange(4), logits)) == values[5]
    assert float(loss(np.arange(4), logits)) != values[5]


@pytest.mark.parametrize("form", ["sparse", "column", "one-hot"])
def test_learned_unigram_counts_labels(form):
    loss = SampledSoftmaxLoss(0.5, "learned_unigram", seed=1)
    labels = np.array([0, 0, 2, 0])
    labels = {"sparse": labels, "column": labels[:, None], "one-hot": np.eye(4)[labels]}[form]
    call = tf.function(loss)
    for _ in range(2):
        call(tf.constant(labels), tf.zeros((4, 4)))
    np.testing.assert_array_equal(loss._counts, [7, 1, 3, 1])
    loss = SampledSoftmaxLoss(0.5, "learned_unigram", seed=1, ignore_class=0)
    loss(np.array([0, 0, 2, 0]), np.zeros((4, 4), "float32"))
    np.testing.assert_array_equal(loss._counts, [1, 1, 2, 1])


@pytest.mark.parametrize("settings", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=str)
@pytest.mark.parametrize(
    "make", [SparsemaxLoss, lambda: SampledSoftmaxLoss(0.5, "learned_unigram", seed=1)]
)
def test_baseline_losses_train(blobs, make, settings):
    x, y = blobs
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    model.compile(keras.optimizers.Adam(0.05), make(), metrics=["accuracy"], **settings)
    history = model.fit(x, y, epochs=12, shuffle=False, verbose=0).history
    assert history["accuracy"][-1] > 0.9


@pytest.mark.parametrize(
    "arguments",
    [{"sample_fraction": 0}, {"sample_fraction": 1.0}, {"sampler": "zipf"}, {"seed": 1.5}],
    ids=str,
)
def test_bad_arguments_of_sampled_softmax(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises((ValueError, TypeError), match=f"{name}.*Received.*{value}"):
        SampledSoftmaxLoss(**{"sample_fraction": 0.5, **arguments})
    with pytest.raises(ValueError, match="2 or more"):
        SampledSoftmaxLoss(0.5)([0], np.zeros((1, 1)))


@pytest.mark.parametrize(
    "loss", [SparsemaxLoss(label_smoothing=0.1), SampledSoftmaxLoss(0.3, "learned_unigram", seed=4)]
)
def test_configs(loss):
    TestCase().run_class_serialization_test(loss)
