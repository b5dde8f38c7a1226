import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import tensorflow as tf

from tf_dropmax import baselines, functional

FUNCTIONS = {
    "expected": functional.expected_log_probabilities,
    "exact": functional.exact_log_probabilities,
    "sampled": functional.sampled_log_probabilities,
    "softmax": lambda o, r: functional.softmax_log_probabilities(o),
    "likelihood": functional.target_log_likelihood,
    "prior": lambda o, r: functional.prior_scores_and_entropy(o, r, r)[0],
    "label": lambda o, r: functional.label_scores_and_entropy(o, r, o, r)[0],
    "entropy": lambda o, r: functional.mask_entropy(r),
    "sparsemax": lambda o, r: baselines.sparsemax_scores(o),
}
KERNELS = sorted(set(FUNCTIONS) - {"exact", "sampled"})


def gradient(name, logits, retain_logits):
    with tf.GradientTape() as tape:
        tape.watch((logits, retain_logits))
        value = FUNCTIONS[name](logits, retain_logits)
    return tape.gradient(value, (logits, retain_logits), unconnected_gradients="zero")


@pytest.mark.parametrize("name", KERNELS)
def test_a_graph_can_be_collected(name):
    """TensorFlow's registry of gradients does not keep it."""

    def graph():
        spec = tf.TensorSpec((None, 3))
        traced = tf.function(partial(gradient, name)).get_concrete_function(spec, spec)
        return weakref.ref(traced.graph)

    graph()
    gone = graph()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_static_shapes_are_kept(name):
    for shape in [(5,), (2, 5), (None, 5), (None, 3, 5), (2, None, 4, 5), (None, None)]:
        spec = tf.TensorSpec(shape)
        found = tf.function(FUNCTIONS[name]).get_concrete_function(spec, spec).output_shapes
        assert found.as_list() == list(shape)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_leading_dimensions_are_rows(rng, name):
    logits, retain_logits = (tf.constant(rng.normal(size=(2, 3, 4))) for _ in range(2))
    rows = [tf.reshape(x, (6, 4)) for x in (logits, retain_logits)]
    expected = FUNCTIONS[name](*rows).numpy()
    np.testing.assert_allclose(
        FUNCTIONS[name](logits, retain_logits), expected.reshape(2, 3, 4), rtol=1e-12
    )


def test_many_numbers_of_classes_are_no_reason_for_a_warning(caplog):
    for classes in range(2, 12):
        functional.mask_entropy(np.zeros((2, classes)))
    assert "retracing" not in caplog.text


@pytest.mark.parametrize("traced", [False, True])
def test_threads_that_use_a_kernel_for_the_first_time(traced):
    """Each number of classes is new, so that all threads find no trace."""

    def use(name, classes):
        compute = partial(gradient, name)
        if traced:
            compute = tf.function(compute, autograph=False)
        return compute(tf.ones((2, classes)), tf.ones((2, classes)))

    with ThreadPoolExecutor(4) as threads:
        for name in KERNELS:
            for classes in range(401, 405):
                found = list(threads.map(use, [name] * 4, [classes + 10 * traced] * 4))
                np.testing.assert_array_equal(found, [found[0]] * 4)
