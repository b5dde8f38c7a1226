import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from predictions import DTYPES
from scipy import special, stats

from tf_dropmax import functional
from tf_dropmax.functional import prediction


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_is_open_reproducible_and_well_distributed(dtype):
    draws = functional.uniform_draws((1000, 1000), (3, 4), dtype).numpy()
    assert draws.dtype == dtype
    assert 0 < draws.min() < 1e-5
    assert 1 - 1e-5 < draws.max() < 1
    np.testing.assert_array_equal(draws, functional.uniform_draws((1000, 1000), (3, 4), dtype))
    compiled = tf.function(functional.uniform_draws, jit_compile=True)
    others = [
        functional.uniform_draws((1000, 1000), seed, dtype)
        for seed in [(4, 4), (3, 5), (2**62, -1)]
    ]
    others += [compiled((1000, 1000), tf.constant(seed), dtype) for seed in [(3, 4), (3, 5)]]
    assert np.abs(others[-1] - others[-2]).mean() == pytest.approx(1 / 3, abs=2e-3)
    for other in others:
        assert np.abs(draws - other).mean() == pytest.approx(1 / 3, abs=2e-3)
    for sample in [draws, *others]:  # the seeds are fixed: passes always or never
        assert stats.kstest(np.ravel(sample)[:100_000], "uniform").pvalue > 1e-6


@pytest.mark.parametrize("compiled", [False, True])
def test_seeds_have_no_draws_in_common(compiled):
    """In float64, equal draws would come from overlapping streams, not from chance."""
    draw = tf.function(functional.uniform_draws, jit_compile=compiled)
    keys = [3, 4, -3, 3 + 2**31 - 1, 3 + 2**32, 3 + prediction._SAMPLE_STRIDE]
    seeds = [*((key, 4) for key in keys), (3, 5), (3, 4 + 2**31 - 1), (3, 4 + 2**32)]
    samples = [draw((200, 100), tf.constant(seed, tf.int64), "float64") for seed in seeds]
    assert len(np.unique(samples)) == np.size(samples)


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 0), (3,), (2, 1, 4)])
def test_uniform_draws_of_any_shape(shape):
    assert functional.uniform_draws(shape, (1, 2)).shape == shape


@pytest.mark.parametrize("signature", [None, (None,), (2,)])
def test_uniform_draws_for_a_seed_of_unknown_shape(signature):
    draw = tf.function(functional.uniform_draws).get_concrete_function(
        (2, 3), tf.TensorSpec(signature, tf.int64)
    )
    drawn = draw(seed=tf.constant([1, 2], tf.int64))
    np.testing.assert_array_equal(drawn, functional.uniform_draws((2, 3), (1, 2)))


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_masks_are_distributed_as_relaxed_bernoulli(temperature):
    """Kolmogorov-Smirnov on 20,000 draws. A right sampler fails with one seed in 10^5."""
    for retain_logit in [-3.0, -0.5, 0.0, 1.0, 4.0]:
        uniform = functional.uniform_draws((20_000,), (5, 6))
        masks = functional.relaxed_mask_logits(
            tf.fill([20_000], retain_logit), uniform, temperature
        ).numpy()
        reference = tfp.distributions.RelaxedBernoulli(temperature, logits=np.float64(retain_logit))
        # On the scale of logits, where neither sample piles up at 0 or 1 by rounding. Draws in
        # float64 resolve logits up to 36.
        reference = special.logit(reference.sample(20_000, seed=7).numpy()).clip(-30, 30)
        assert stats.ks_2samp(masks.clip(-30, 30), reference).pvalue > 1e-6
