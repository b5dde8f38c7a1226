"""What several tests of the mathematics share."""

from functools import partial

import tensorflow as tf

from tf_dropmax import functional

DTYPES = ["float32", "float64"]
PREDICTIONS = {
    "expected": functional.expected_log_probabilities,
    "exact": functional.exact_log_probabilities,
    "sampled": partial(functional.sampled_log_probabilities, samples=7, seed=(1, 2)),
    "softmax": lambda o, r, **kwargs: functional.softmax_log_probabilities(o, **kwargs),
}


def value_and_gradients(function, *arguments):
    arguments = [tf.constant(x) for x in arguments]
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        value = function(*arguments)
    return value.numpy(), [g.numpy() for g in tape.gradient(value, arguments)]
