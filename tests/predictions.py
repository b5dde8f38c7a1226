"""What several tests of the mathematics share."""

import tensorflow as tf

from tf_dropmax import functional

DTYPES = ["float32", "float64"]
PREDICTIONS = {
    "expected": functional.expected_log_probabilities,
    "exact": functional.exact_log_probabilities,
    "sampled": lambda o, r: functional.sampled_log_probabilities(o, r, samples=7, seed=(1, 2)),
    "softmax": lambda o, r: functional.softmax_log_probabilities(o),
}


def value_and_gradients(function, *arguments):
    arguments = [tf.constant(x) for x in arguments]
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        value = function(*arguments)
    return value.numpy(), [g.numpy() for g in tape.gradient(value, arguments)]
