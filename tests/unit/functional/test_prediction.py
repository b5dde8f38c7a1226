import numpy as np
import oracles
import pytest
import tensorflow as tf
from predictions import DTYPES, PREDICTIONS, value_and_gradients

from tf_dropmax import functional


@pytest.mark.parametrize("mode", ["expected", "exact", "softmax"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_predictions(golden, mode, dtype):
    log_p = PREDICTIONS[mode](golden["logits"].astype(dtype), golden["retain_logits"].astype(dtype))
    np.testing.assert_allclose(np.exp(log_p), golden[mode], atol=1e-5 if mode == "exact" else 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32"])
def test_other_types_are_computed_in_float32(dtype):
    logits = tf.cast([[1, 2, 3]], dtype)
    for mode, function in PREDICTIONS.items():
        log_p = function(logits, logits)
        assert log_p.dtype == "float32"
        np.testing.assert_allclose(log_p, function(*[tf.cast(logits, "float32")] * 2), err_msg=mode)


@pytest.mark.parametrize("mode", PREDICTIONS)
def test_rows_do_not_touch_each_other(rng, mode):
    logits, retain_logits = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    before = PREDICTIONS[mode](logits, retain_logits).numpy()
    for value in [np.nan, np.inf, -np.inf]:
        for broken in [logits, retain_logits][: 1 if mode == "softmax" else 2]:
            kept, broken[1, 2] = broken[1, 2], value
            after = PREDICTIONS[mode](logits, retain_logits).numpy()
            np.testing.assert_allclose(after[[0, 2]], before[[0, 2]], atol=1e-12)
            if np.isnan(value):  # a network that diverged must not look like one that does not know
                assert np.isnan(after[1]).all()
            broken[1, 2] = kept


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["expected", "exact"])
def test_prediction_gradients(rng, mode):
    logits, retain_logits = 2 * rng.normal(size=(3, 5)), 2 * rng.normal(size=(3, 5))
    weights = rng.normal(size=(3, 5))

    def value(o, r):
        return tf.reduce_sum(weights * PREDICTIONS[mode](o, r))

    _, gradients = value_and_gradients(value, logits, retain_logits)
    reference = [
        oracles.central_differences(lambda o: value(o, retain_logits).numpy(), logits, 1e-5),
        oracles.central_differences(lambda r: value(logits, r).numpy(), retain_logits, 1e-5),
    ]
    np.testing.assert_allclose(gradients, reference, atol=1e-7)
    if mode == "exact":  # and against the other definition

        def enumerated(o, r):
            return np.sum(weights * np.log(oracles.enumerate_masks(o, r)))

        by_enumeration = [
            oracles.central_differences(lambda o: enumerated(o, retain_logits), logits, 1e-5),
            oracles.central_differences(lambda r: enumerated(logits, r), retain_logits, 1e-5),
        ]
        np.testing.assert_allclose(gradients, by_enumeration, atol=1e-7)


def test_sampled_gradient(rng):
    logits, retain_logits = (
        rng.normal(size=(6, 4)),
        rng.normal(size=(6, 4)) - np.arange(6)[:, None] / 3 + 0.5,
    )
    weights = rng.normal(size=(6, 4))

    def value(o):
        p = tf.exp(functional.sampled_log_probabilities(o, retain_logits, samples=20, seed=(1, 2)))
        return tf.reduce_sum(weights * tf.math.log(p + 0.01))

    _, (gradient,) = value_and_gradients(value, logits)
    np.testing.assert_allclose(
        gradient, oracles.central_differences(lambda o: value(o).numpy(), logits, 1e-6), atol=1e-7
    )


def test_the_gradient_of_sampled_by_the_retain_logits_is_that_of_the_expectation(rng):
    logits, retain_logits = rng.normal(size=(2, 4)), rng.normal(size=(2, 4))
    weights = rng.normal(size=(2, 4))
    weights -= weights.mean(-1, keepdims=True)  # Then the normalisation of the draws has no part.

    def enumerated(r):
        return np.sum(weights * np.log(oracles.enumerate_masks(logits, r)))

    _, (gradient,) = value_and_gradients(
        lambda r: weights * functional.sampled_log_probabilities(logits, r, 2), retain_logits
    )
    expected = oracles.central_differences(enumerated, retain_logits, 1e-5)
    np.testing.assert_allclose(gradient, expected, atol=1e-7)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("margin", [20.0, 30.0])
@pytest.mark.parametrize("mode", PREDICTIONS)
def test_sure_predictions_have_the_gradient_of_the_softmax(mode, margin, traced):
    """Every mask keeps every class. The value is not 0, and neither is the gradient."""
    logits, retain_logits = tf.constant([[margin, 0.0, -1.0]]), tf.fill((1, 3), 50.0)

    def log_p_and_gradient(logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            log_p = PREDICTIONS[mode](logits, retain_logits)
            value = log_p[:, 0]
        return log_p, tape.gradient(value, logits)

    run = tf.function(log_p_and_gradient) if traced else log_p_and_gradient
    log_p, gradient = run(logits)
    assert -1e-7 < log_p[0, 0] < -1e-9
    np.testing.assert_allclose(gradient[0, 1:], -np.exp([-margin, -margin - 1]), rtol=1e-3)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 2.0, 100.0])
@pytest.mark.parametrize("mode", PREDICTIONS)
def test_temperatures(rng, mode, temperature, as_tensor):
    logits, retain_logits = 2 * rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 4))
    plain = PREDICTIONS[mode](logits, retain_logits).numpy() / temperature
    expected = plain - np.log(np.exp(plain - plain.max(-1, keepdims=True)).sum(-1, keepdims=True))
    expected -= plain.max(-1, keepdims=True)
    scale = tf.constant(temperature) if as_tensor else temperature
    found = PREDICTIONS[mode](logits, retain_logits, temperature=scale)
    np.testing.assert_allclose(found, expected, atol=1e-6 / temperature, rtol=1e-6)
    extremes = 1e30 * rng.choice([-1.0, 1.0], size=(2, 20, 4)).astype("float32")
    assert np.isfinite(PREDICTIONS[mode](*extremes, temperature=scale)).all()


def test_sampled_is_the_mean_over_hard_masks(rng):
    logits, retain_logits = np.log([[0.5, 0.3, 0.2]]), np.array([[50.0, 0.0, -50.0]])
    drawn = {
        tuple(
            np.exp(functional.sampled_log_probabilities(logits, retain_logits, 1, (s, 2))).round(8)[
                0
            ]
        )
        for s in range(20)
    }
    assert drawn == {(1, 0, 0), (0.625, 0.375, 0)}
    # All masks 0: uniform.
    np.testing.assert_allclose(
        np.exp(functional.sampled_log_probabilities(logits, np.full((1, 3), -50.0))),
        [[1 / 3] * 3],
        rtol=1e-7,
    )
    # 10,000 masks: standard error at most 0.005 in each of 90 numbers; 5 sigma.
    logits, retain_logits = rng.normal(size=(15, 6)), 2 * rng.normal(size=(15, 6))
    draw = tf.function(functional.sampled_log_probabilities)
    p, other = (
        np.exp(draw(logits, retain_logits, tf.constant(10_000), tf.constant(seed)))
        for seed in [(3, 4), (3, 5)]
    )
    np.testing.assert_allclose(p, oracles.enumerate_masks(logits, retain_logits), atol=0.025)
    assert 1e-4 < np.abs(p - other).max() < 0.05


@pytest.mark.parametrize("samples", [2, 500])
def test_sampling_memory_does_not_grow_with_samples(samples):
    """No tensor of forward and backward pass is larger than (B, T). No loop stacks tensors."""

    @tf.function
    def gradient(o, r):
        with tf.GradientTape() as tape:
            tape.watch(o)
            value = functional.sampled_log_probabilities(o, r, samples)
        return tape.gradient(value, o)

    traced = gradient.get_concrete_function(tf.TensorSpec((8, 16)), tf.TensorSpec((8, 16)))
    definitions = traced.graph.as_graph_def(add_shapes=True)
    nodes = [
        *definitions.node,
        *(node for function in definitions.library.function for node in function.node_def),
    ]
    assert any("While" in node.op for node in nodes)
    assert not [node.name for node in nodes if node.op.startswith(("TensorList", "Stack"))]
    shapes = [shape for node in nodes for shape in node.attr["_output_shapes"].list.shape]
    sizes = [np.prod([dim.size for dim in shape.dim]) for shape in shapes if not shape.unknown_rank]
    assert max(sizes) == 8 * 16


@pytest.mark.parametrize("mode", PREDICTIONS)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_predictions_under_xla_and_with_any_leading_shape(rng, mode, jit_compile):
    logits, retain_logits = (
        rng.normal(size=(2, 3, 5)).astype("float32"),
        rng.normal(size=(2, 3, 5)).astype("float32"),
    )
    function = tf.function(PREDICTIONS[mode], jit_compile=jit_compile)
    log_p = function(logits, retain_logits)
    assert log_p.shape == (2, 3, 5)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, atol=1e-6)
    if mode != "sampled" or not jit_compile:  # XLA draws other numbers
        flat = PREDICTIONS[mode](logits.reshape(6, 5), retain_logits.reshape(6, 5)).numpy()
        np.testing.assert_allclose(log_p, flat.reshape(2, 3, 5), atol=1e-5)
    assert PREDICTIONS[mode](logits[0, 0], retain_logits[0, 0]).shape == (5,)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_loop_gradients_under_xla(rng, mode, jit_compile):
    def gradient(o, r):
        with tf.GradientTape() as tape:
            tape.watch(o)
            value = PREDICTIONS[mode](o, r)[:, 0]
        return tape.gradient(value, o)

    arguments = [tf.constant(rng.normal(size=(4, 5))) for _ in range(2)]
    if mode == "sampled":
        arguments[1] += 50.0  # XLA draws other numbers: let every class be retained
    compiled = tf.function(gradient, jit_compile=jit_compile)(*arguments)
    np.testing.assert_allclose(compiled, gradient(*arguments), atol=1e-9)


def test_logits_are_shift_invariant(rng):
    logits, retain_logits = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    masks = functional.relaxed_mask_logits(
        retain_logits, functional.uniform_draws((6, 5), (1, 2), "float64")
    )
    functions = {
        **PREDICTIONS,
        "scores": lambda o, r: functional.prior_scores_and_entropy(o, r, masks)[0],
    }
    for name, function in functions.items():
        for shift in [1e3, -1e6]:
            shifted = function(logits + shift, retain_logits)
            np.testing.assert_allclose(
                shifted, function(logits, retain_logits), atol=1e-8, err_msg=name
            )


EXTREMES = [0.0, 1.0, -20.0, 90.0, -1e4, 1e4, 3e8, 1.5e9, -2e9, 1e30, -1e30]


@pytest.mark.parametrize("classes", [1, 2, 3, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    [*PREDICTIONS, "scores", "attention", "random", "entropy", "label"],
)
def test_finite_for_inputs_up_to_the_limit(rng, classes, dtype, name):
    """Values and gradients, with every sign and size of logits, masks all 0 and all 1 included."""
    logits = rng.choice(EXTREMES, size=(30, classes)).astype(dtype)
    retain_logits = rng.choice(EXTREMES, size=(30, classes)).astype(dtype)
    retain_logits[0], retain_logits[1], logits[2] = -1e4, 1e4, 0.0
    uniform = functional.uniform_draws((30, classes), (1, 2), dtype)
    functions = {
        **PREDICTIONS,
        "scores": lambda o, r: functional.prior_scores_and_entropy(
            o, r, functional.relaxed_mask_logits(r, uniform, 0.1)
        )[0],
        "attention": lambda o, r: (
            functional.expected_log_probabilities(o, r) - functional.mask_entropy(r)
        ),
        "random": lambda o, r: functional.target_log_likelihood(
            o, functional.bernoulli_mask_logits(0.2, uniform)
        ),
        "entropy": lambda o, r: functional.mask_entropy(r) + 0 * o,
        "label": lambda o, r: functional.label_scores_and_entropy(
            o,
            r,
            r[::-1],
            functional.relaxed_mask_logits(functional.posterior_logits(r, r[::-1]), uniform),
            100.0,
        )[0],
    }
    outputs = {}

    def total(o, r):
        outputs["value"] = functions[name](o, r)
        # Weighed by what a loss could send back, each row by one label or by all.
        return (
            tf.reduce_sum(outputs["value"][::2, 0] / 1e30) * 1e30
            + tf.reduce_sum(outputs["value"][1::2] / 1e30) * 1e30
        )

    arguments = [tf.constant(logits), tf.constant(retain_logits)]
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        value = total(*arguments)
    gradients = tape.gradient(value, arguments, unconnected_gradients="zero")
    assert np.isfinite(outputs["value"]).all()
    assert all(np.isfinite(g).all() for g in gradients)
    if name in PREDICTIONS:
        np.testing.assert_allclose(
            np.exp(outputs["value"].numpy().astype("float64")).sum(-1), 1, atol=1e-5
        )


def test_a_hundred_thousand_classes(rng):
    logits = rng.normal(size=(2, 100_000)).astype("float32")
    retain_logits = (3 * rng.normal(size=(2, 100_000))).astype("float32")
    for name, function in PREDICTIONS.items():
        log_p = function(logits, retain_logits).numpy()
        assert np.isfinite(log_p).all(), name
        np.testing.assert_allclose(
            np.exp(log_p.astype("float64")).sum(-1), 1, atol=1e-4, err_msg=name
        )
    uniform = functional.uniform_draws((2, 100_000), (1, 2))
    scores, gradients = value_and_gradients(
        lambda o, r: functional.prior_scores_and_entropy(
            o, r, functional.relaxed_mask_logits(r, uniform)
        )[0],
        logits,
        retain_logits,
    )
    assert np.isfinite(scores).all()
    assert np.isfinite(gradients).all()
    # With so many classes, the expectation is close to the expected masks.
    np.testing.assert_allclose(
        functional.exact_log_probabilities(logits, retain_logits),
        functional.expected_log_probabilities(logits, retain_logits),
        atol=5e-3,
    )
