import numpy as np
import oracles
import pytest
from predictions import DTYPES

from tf_dropmax import functional


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 10.0, 30.0, 60.0])
def test_exact_agrees_with_enumeration(rng, dtype, spread):
    logits = spread * rng.uniform(size=(150, 9))
    logits[:, 0], logits[:, 1] = 0, spread
    retain_logits = rng.uniform(-15, 15, size=(150, 9))
    retain_logits[:50] = rng.uniform(-15, -3, size=(50, 9))
    retain_logits[50:80] = rng.uniform(-1, 1, size=(30, 9))
    log_p = functional.exact_log_probabilities(
        logits.astype(dtype), retain_logits.astype(dtype)
    ).numpy()
    reference = oracles.enumerate_masks(logits.astype(dtype), retain_logits.astype(dtype))
    np.testing.assert_allclose(np.exp(log_p), reference, atol=2e-6 if dtype == "float32" else 1e-12)
    np.testing.assert_allclose(
        log_p, np.log(reference), atol=1e-3
    )  # small probabilities keep their size, too


def test_exact_keeps_the_size_of_small_probabilities():
    logits = np.array([[12.7, 20.5, -58.1, -20.9, 24.7, -34.1]], "float32")
    retain_logits = np.full((1, 6), 12, "float32")
    reference = np.log(oracles.enumerate_masks(logits, retain_logits))
    np.testing.assert_allclose(
        functional.exact_log_probabilities(logits, retain_logits), reference, atol=5e-3
    )
    assert reference.min() < -55


def test_exact_beyond_the_quadrature_range(rng):
    logits = rng.choice([0.0, 70.0, 1e4, 1e30], size=(60, 6)) + rng.uniform(size=(60, 6))
    retain_logits = rng.uniform(-5, 5, size=(60, 6))
    reference = oracles.enumerate_masks(logits, retain_logits)
    np.testing.assert_allclose(
        np.exp(functional.exact_log_probabilities(logits, retain_logits)), reference, atol=1e-11
    )


@pytest.mark.parametrize("classes", [1, 100, 10_000])
def test_exact_with_one_class_and_with_many(classes):
    """The oracles are a much finer quadrature and symmetry, where enumeration takes too long."""
    logits = np.zeros((4, classes), "float32")
    logits[0, 0], logits[1, 0], logits[2] = np.log(classes), 3, np.linspace(0, 12, classes)
    for retain_logit in [-4.0, 0.0, 3.0]:
        retain_logits = np.full((4, classes), retain_logit, "float32")
        p = np.exp(functional.exact_log_probabilities(logits, retain_logits))
        reference = np.exp(
            functional.exact_log_probabilities(
                logits.astype("float64"), retain_logits.astype("float64")
            )
        )
        np.testing.assert_allclose(p, reference, atol=5e-6)
        np.testing.assert_allclose(p[3], 1 / classes, rtol=1e-3)
