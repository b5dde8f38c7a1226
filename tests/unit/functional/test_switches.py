"""Switches of TensorFlow that change every operation. They cannot be undone."""

import subprocess
import sys

import pytest

CODE = """
import numpy as np
import tensorflow as tf

tf.debugging.enable_check_numerics()
tf.experimental.numpy.experimental_enable_numpy_behavior()
from tf_dropmax import functional as F


def run(o, r, a):
    with tf.GradientTape(persistent=True) as tape:
        tape.watch((o, r, a))
        uniform = F.uniform_draws((3, 4), (1, 2), o.dtype)
        masks = F.relaxed_mask_logits(r, uniform)
        posterior = F.relaxed_mask_logits(F.posterior_logits(r, a), uniform)
        results = [
            F.softmax_log_probabilities(o, 0.5),
            F.expected_log_probabilities(o, r, 0.5),
            F.exact_log_probabilities(o, r, 0.5),
            F.sampled_log_probabilities(o, r, 3, (1, 2), 0.5),
            F.target_log_likelihood(o, F.bernoulli_mask_logits(0.4, uniform)),
            *F.prior_scores_and_entropy(o, r, masks, 0.5),
            *F.label_scores_and_entropy(o, r, a, posterior, 0.5),
            F.mask_entropy(r),
        ]
    gradients = [tape.gradient(y, (o, r, a), unconnected_gradients="zero") for y in results]
    return results, gradients, list(F.uncertainty(o, r, 3))


for dtype in ("float32", "float64"):
    arguments = [tf.constant(np.random.default_rng(i).normal(size=(3, 4)), dtype) for i in range(3)]
    for value in tf.nest.flatten(tf.function(run)(*arguments)):
        assert value.dtype == dtype and np.isfinite(value).all()
"""


@pytest.mark.slow
def test_everything_works():
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=300)
