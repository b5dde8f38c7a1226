import numpy as np
import oracles
import pytest
import tensorflow as tf
from predictions import DTYPES, value_and_gradients

from tf_dropmax import functional


@pytest.fixture
def point(rng):
    """Logits, retain logits, logits of masks and auxiliary logits of one row, side by side."""
    return tf.constant(np.concatenate([*3 * rng.normal(size=(3, 6)), np.linspace(-3, 2, 6)]))


WEIGHTS = np.linspace(-1, 2, 6)
SCORES = {
    "prior": (
        lambda o, r, x, a: functional.prior_scores_and_entropy(o, r, x, 0.3, 0.6),
        lambda o, r, x, a: oracles.tf_prior_scores_and_entropy(o, r, x, 0.3, 0.6),
    ),
    "label, with masks that depend on the branches": (
        lambda o, r, x, a: functional.label_scores_and_entropy(
            o, r, a, functional.posterior_logits(r, a) + x, 0.3, 0.6
        ),
        lambda o, r, x, a: oracles.tf_label_scores_and_entropy(
            o, r, a, tf.stop_gradient(r) + a + x, 0.3, 0.6
        ),
    ),
    "likelihood": (
        lambda o, r, x, a: (functional.target_log_likelihood(o, x), 0.0),
        lambda o, r, x, a: (oracles.tf_target_log_likelihood(o, x), 0.0),
    ),
    "expected": (
        lambda o, r, x, a: (functional.expected_log_probabilities(o, r, 0.7), 0.0),
        lambda o, r, x, a: (tf.nn.log_softmax((o - tf.nn.softplus(-r)) / 0.7), 0.0),
    ),
    "entropy": (
        lambda o, r, x, a: (functional.mask_entropy(r), 0.0),
        lambda o, r, x, a: (oracles.tf_mask_entropy(r), 0.0),
    ),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_derivatives_are_those_of_plain_tensorflow(point, name, traced):
    """First and second derivatives, the mixed ones too, with the same gradients stopped."""

    def derivatives(function):
        with tf.GradientTape() as outer:
            outer.watch(point)
            with tf.GradientTape() as inner:
                inner.watch(point)
                scores, entropy = function(*tf.split(point, 4))
                value = tf.reduce_sum(scores * WEIGHTS) + 0.7 * entropy
            gradient = inner.gradient(value, point)
        return value, gradient, outer.jacobian(gradient, point)

    run = tf.function(derivatives, autograph=False) if traced else derivatives
    found, expected = (run(function) for function in SCORES[name])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


def test_small_entropies_and_divergences_keep_their_digits(rng):
    """In float32 as in float64, with retain probabilities close to 1."""
    r = rng.uniform(2, 60, size=(50, 4)).astype("float32")
    shift = rng.uniform(-4, 4, size=(50, 4)).astype("float32")

    def divergence(dtype):
        """The sum of the KL divergences of the other classes, without masks and auxiliary loss."""
        zeros, kept = tf.zeros_like(r, dtype), tf.fill(r.shape, tf.constant(99, dtype))
        prior, auxiliary = r.astype(dtype), shift.astype(dtype)
        scores, _ = functional.label_scores_and_entropy(zeros, prior, auxiliary, kept, 0.0)
        # The score of a class is `log rho` - log 4 less this sum.
        return (tf.math.log_sigmoid(prior) - np.log(4) - scores).numpy()

    exact = divergence("float64")
    assert exact.max() > 0.1
    np.testing.assert_allclose(divergence("float32"), exact, rtol=3e-6, atol=5e-7)
    for x in (r, -r):
        entropies = (functional.mask_entropy(x.astype(dtype)) for dtype in ("float32", "float64"))
        np.testing.assert_allclose(*entropies, rtol=1e-6)


def test_the_auxiliary_gradient_keeps_its_digits():
    """Classes that the auxiliary classifier excludes have a small gradient, not none."""
    auxiliary = tf.constant([[0.0, -10.0, -14.0, -20.0, -30.0]])
    others = [tf.fill((1, 5), x) for x in (0.0, -30.0, 9.0)]
    with tf.GradientTape() as tape:
        tape.watch(auxiliary)
        scores, _ = functional.label_scores_and_entropy(*others[:2], auxiliary, others[2], 0.5)
        loss = -scores[0, 0]
    gradient = tape.gradient(loss, auxiliary)[0, 1:]
    np.testing.assert_allclose(gradient, 0.5 * tf.sigmoid(auxiliary[0, 1:]), rtol=1e-5)


@pytest.mark.parametrize("gap", [10.0, 30.0, 50.0, 65.0])
def test_a_dropped_maximum_hides_no_other_class(rng, gap):
    """The kept classes are far below the largest logit, whose mask is 0."""
    logits = rng.normal(size=(20, 6))
    logits[:, 0] = logits[:, 1:].max(-1) + gap
    kept = tf.constant([[-2000.0, 2000.0, 2000.0, 2000.0, 0.5, -1.0]])
    likelihood, (by_logits, _) = value_and_gradients(
        lambda o, m: functional.target_log_likelihood(o, m)[:, 1:],
        logits.astype("float32"),
        np.repeat(kept, 20, 0).astype("float32"),
    )
    masks = 1 / (1 + np.exp(-kept.numpy().astype("float64")[:, 1:]))
    weights = np.exp(logits[:, 1:].astype("float32").astype("float64"))
    total = (masks * weights).sum(-1, keepdims=True)
    expected = np.log(weights / (total + (1 - masks) * weights))
    np.testing.assert_allclose(likelihood, expected, atol=2e-4)
    np.testing.assert_allclose(by_logits[:, 0], 0, atol=1e-4)
    np.testing.assert_allclose(by_logits.sum(-1), 0, atol=1e-4)


@pytest.mark.parametrize("classes", [4, 10_000])
@pytest.mark.parametrize("upstream", [1.0, 2.0**15, 2.0**24, 1e10])
def test_large_gradients_of_the_loss_stay_finite(classes, upstream):
    """A loss scale or a sample weight multiplies what the scores get back."""
    logits = np.zeros((2, classes), "float32")
    logits[:, 0] = 100
    masks = np.full((2, classes), 1e4, "float32")
    masks[0], masks[1, 0] = -1e4, -1e4
    prior = tf.zeros((2, classes))

    def total(o, m):
        scores = (
            functional.target_log_likelihood(o, m),
            functional.prior_scores_and_entropy(o, prior, m)[0],
            functional.label_scores_and_entropy(o, prior, prior, m)[0],
        )
        return upstream * tf.stack(scores)

    _, gradients = value_and_gradients(total, logits, masks)
    for gradient in gradients:
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("traced", [False, True])
def test_arguments_of_scores_broadcast(rng, traced):
    """Value and gradients equal those of the repeated arguments, also with unknown shapes."""
    shapes = (1, 3), (4, 3), (2, 1, 3)
    arguments = [tf.constant(rng.normal(size=shape)) for shape in shapes]
    repeated = [tf.constant(np.broadcast_to(x, (2, 4, 3)).copy()) for x in arguments]
    weights = rng.normal(size=(2, 4, 3))

    def run(*arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            scores, entropy = functional.prior_scores_and_entropy(*arguments, 0.3)
            likelihood = functional.target_log_likelihood(arguments[0], arguments[2])
            prediction = functional.expected_log_probabilities(*arguments[:2])
            total = tf.reduce_sum(weights * scores) + tf.reduce_sum(weights[..., 0] * entropy)
            total += tf.reduce_sum(weights * likelihood) + tf.reduce_sum(weights * prediction)
        return total, *tape.gradient(total, arguments)

    signature = [tf.TensorSpec([None] * len(shape), tf.float64) for shape in shapes]
    function = tf.function(run, input_signature=signature) if traced else run
    total, *gradients = function(*arguments)
    expected, *full = run(*repeated)
    assert float(total) == pytest.approx(float(expected), rel=1e-12)
    for gradient, by_repeated, shape in zip(gradients, full, shapes, strict=True):
        repeats = np.flatnonzero(np.array((1,) * (3 - len(shape)) + shape) != (2, 4, 3))
        summed = np.sum(by_repeated, axis=tuple(repeats)).reshape(shape)
        np.testing.assert_allclose(gradient, summed, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_keep_what_is_added_to_them(rng, dtype):
    """Between 1e7 and 1e12 the gaps of float32 are of the size of a mask's logarithm."""
    logits = (10 ** rng.uniform(7, 12, size=(300, 3))).astype(dtype)
    masks = np.full((300, 3), -200, dtype)
    likelihood, gradients = value_and_gradients(functional.target_log_likelihood, logits, masks)
    target = logits.argmax(-1)
    np.testing.assert_allclose(np.take_along_axis(likelihood, target[:, None], -1), 0, atol=1e-5)
    assert np.isfinite(likelihood).all()
    assert np.isfinite(gradients).all()


def test_random_dropmax_is_a_softmax_over_the_retained(rng):
    logits, uniform = rng.normal(size=(5, 4)), rng.uniform(size=(5, 4))
    likelihood = functional.target_log_likelihood(
        logits, functional.bernoulli_mask_logits(0.4, uniform)
    )
    for row in range(5):
        for y in range(4):
            keep = uniform[row] < 0.4
            keep[y] = True
            expected = np.exp(logits[row, y]) / np.exp(logits[row][keep]).sum()
            assert np.exp(likelihood[row, y]) == pytest.approx(expected, rel=1e-12)
