"""Switches of TensorFlow that change every operation, each in a process of its own."""

import subprocess
import sys

import pytest

CODE = """
import numpy as np
import tensorflow as tf

{switch}
from tf_dropmax import functional as F

o, r, a = (tf.constant(np.random.default_rng(0).normal(size=(3, 4)), {dtype!r}) for _ in range(3))
uniform = F.uniform_draws((3, 4), (1, 2), {dtype!r})


def run(o, r, a):
    with tf.GradientTape(persistent=True) as tape:
        tape.watch((o, r, a))
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


assert all(np.isfinite(value).all() for value in tf.nest.flatten(tf.function(run)(o, r, a)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "switch",
    [
        "tf.debugging.enable_check_numerics()",
        "tf.experimental.numpy.experimental_enable_numpy_behavior()",
    ],
)
def test_everything_works(switch, dtype):
    code = CODE.format(switch=switch, dtype=dtype)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
