import numpy as np
import oracles
import pytest
import tensorflow as tf
from predictions import DTYPES, value_and_gradients

from tf_dropmax import functional


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 10.0, 30.0, 60.0, 61.0, 90.0, 200.0, 1e3, 1e6])
def test_exact_agrees_with_enumeration(rng, dtype, spread):
    """Small probabilities keep their size, too."""
    logits = (spread * rng.uniform(size=(150, 8))).astype(dtype)
    logits[:, 0], logits[:, 1] = 0, spread
    retain_logits = rng.uniform(-12, 15, size=(150, 8)).astype(dtype)
    retain_logits[:50] = rng.uniform(-12, -3, size=(50, 8))
    retain_logits[50:80] = rng.uniform(-1, 1, size=(30, 8))
    log_p = functional.exact_log_probabilities(logits, retain_logits).numpy()
    reference = oracles.enumerate_masks(logits, retain_logits)
    tolerance, smallest = (2e-6, 1e-29) if dtype == "float32" else (1e-12, 1e-250)
    np.testing.assert_allclose(
        np.exp(log_p), reference, atol=tolerance if spread <= 60 else 2 * tolerance
    )
    assert np.isfinite(log_p).all()
    assert spread < 60 or reference.min() < 1e-20
    tolerance = 1e-6 if dtype == "float64" else 1e-3 if spread <= 60 else 0.02
    large = reference > smallest
    np.testing.assert_allclose(log_p[large], np.log(reference[large]), atol=tolerance)


def test_exact_beyond_the_quadrature_range(rng):
    logits = rng.choice([0.0, 70.0, 1e4, 1e30], size=(60, 6)) + rng.uniform(size=(60, 6))
    retain_logits = rng.uniform(-5, 5, size=(60, 6))
    reference = oracles.enumerate_masks(logits, retain_logits)
    np.testing.assert_allclose(
        np.exp(functional.exact_log_probabilities(logits, retain_logits)), reference, atol=1e-11
    )


@pytest.mark.parametrize("classes", [1, 100, 10_000])
def test_exact_with_one_class_and_with_many(classes):
    """The references are a much finer quadrature, and symmetry: enumeration would take too long."""
    logits = np.zeros((4, classes), "float32")
    logits[0, 0], logits[1, 0], logits[2] = np.log(classes), 3, np.linspace(0, 12, classes)
    for retain_logit in [-4.0, 0.0, 3.0]:
        retain_logits = np.full((4, classes), retain_logit, "float32")
        p = np.exp(functional.exact_log_probabilities(logits, retain_logits))
        double = (x.astype("float64") for x in (logits, retain_logits))
        reference = np.exp(functional.exact_log_probabilities(*double))
        np.testing.assert_allclose(p, reference, atol=5e-6)
        np.testing.assert_allclose(p[3], 1 / classes, rtol=1e-3)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_exact_rows_do_not_depend_on_one_another(rng, jit_compile):
    """Nor do their gradients."""
    logits = np.concatenate([rng.uniform(0, spread, (8, 6)) for spread in (3, 59, 90, 1e4, 1e30)])
    logits[8:16, 0] = logits[8:16].max(-1) + 45  # a gap
    logits, retain_logits = logits.astype("float32"), rng.uniform(-9, 9, (40, 6)).astype("float32")
    upstream = tf.constant(rng.normal(size=6), tf.float32)

    @tf.function(jit_compile=jit_compile, reduce_retracing=True)
    def exact(logits, retain_logits):
        with tf.GradientTape() as tape:
            tape.watch((logits, retain_logits))
            log_p = functional.exact_log_probabilities(logits, retain_logits)
            value = log_p * upstream
        return log_p, *tape.gradient(value, (logits, retain_logits))

    logits, retain_logits = tf.constant(logits), tf.constant(retain_logits)
    together = exact(logits, retain_logits)
    alone = [exact(logits[i : i + 1], retain_logits[i : i + 1]) for i in range(len(logits))]
    for one, other in zip(together, zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(one, np.concatenate(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("levels", "tolerance"), [([-2.0, 0.0, 2.0], 1e-7), ([0.0, 30.0, 75.0, 140.0, 400.0], 1e-5)]
)
def test_exact_gradients(rng, levels, tolerance):
    logits = rng.choice(levels, size=(20, 6)) + rng.uniform(size=(20, 6))
    retain_logits = rng.uniform(-5, 5, size=(20, 6))
    weights = rng.normal(size=(20, 6))

    def enumerated(logits, retain_logits):
        reference = oracles.enumerate_masks(logits, retain_logits)
        return np.sum(weights * np.log(reference), where=reference > 1e-250)

    def exact(*arguments):
        log_p = functional.exact_log_probabilities(*arguments)
        return tf.reduce_sum(tf.where(log_p > np.log(1e-250), weights * log_p, 0))

    _, (by_logits, by_retain) = value_and_gradients(exact, logits, retain_logits)
    expected = oracles.central_differences(lambda x: enumerated(x, retain_logits), logits, 1e-5)
    np.testing.assert_allclose(by_logits, expected, atol=tolerance)
    expected = oracles.central_differences(lambda x: enumerated(logits, x), retain_logits, 1e-5)
    np.testing.assert_allclose(by_retain, expected, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gradients_of_tiny_probabilities_are_finite(dtype):
    logits, retain_logits = tf.constant([[0, -200.0]], dtype), tf.constant([[1000, 0.0]], dtype)
    with tf.GradientTape() as tape:
        tape.watch([logits, retain_logits])
        log_p = functional.exact_log_probabilities(logits, retain_logits)
    for gradient in tape.gradient(log_p, [logits, retain_logits], 100 * tf.ones_like(log_p)):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("dtype", "retain_logits", "tolerance"),
    [
        ("float32", [-11.4, 12.0, -5.0], 2e-3),
        ("float32", [-11.4, 11.0, -5.0], 2e-3),
        ("float64", [-27.0, 27.0, -5.0], 1e-6),
        ("float64", [-25.0, 30.0, -5.0], 1e-6),
    ],
)
def test_the_masks_that_drop_every_class_count_in_small_probabilities(
    dtype, retain_logits, tolerance
):
    logits, retain_logits = (np.array([x], dtype) for x in ([50.0, 0.0, -1.0], retain_logits))
    found = functional.exact_log_probabilities(logits, retain_logits)
    expected = np.log(oracles.enumerate_masks(logits, retain_logits))
    assert float(found[0, 0]) == pytest.approx(expected[0, 0], abs=tolerance)
