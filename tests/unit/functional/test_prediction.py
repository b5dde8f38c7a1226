import numpy as np
import oracles
import pytest
import tensorflow as tf
from predictions import DTYPES, PREDICTIONS, value_and_gradients
from scipy.special import log_softmax

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


def test_gradients_of_sampled(rng):
    """By the logits, through the draws. By the retain logits, that of the expectation."""
    logits, retain_logits = rng.normal(size=(2, 6, 4))
    weights = rng.normal(size=(6, 4))
    weights -= weights.mean(-1, keepdims=True)  # Then the normalisation of the draws has no part.

    def sampled(o, r):
        log_p = functional.sampled_log_probabilities(o, r, samples=20, seed=(1, 2))
        return tf.reduce_sum(weights * log_p)

    def enumerated(r):
        return np.sum(weights * np.log(oracles.enumerate_masks(logits, r)))

    _, (by_logits, by_retain) = value_and_gradients(sampled, logits, retain_logits)
    expected = oracles.central_differences(
        lambda o: sampled(o, retain_logits).numpy(), logits, 1e-6
    )
    np.testing.assert_allclose(by_logits, expected, atol=1e-7)
    expected = oracles.central_differences(enumerated, retain_logits, 1e-5)
    np.testing.assert_allclose(by_retain, expected, atol=1e-7)


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


def test_a_masked_logit_stays_infinite():
    log_p = functional.softmax_log_probabilities([0.0, -np.inf, 0.0]).numpy()
    np.testing.assert_allclose(log_p, [-np.log(2), -np.inf, -np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 2.0, 100.0])
@pytest.mark.parametrize("mode", PREDICTIONS)
def test_temperatures(rng, mode, temperature, as_tensor):
    logits, retain_logits = 2 * rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 4))
    plain = PREDICTIONS[mode](logits, retain_logits).numpy()
    expected = log_softmax(plain / temperature, axis=-1)
    scale = tf.constant(temperature) if as_tensor else temperature
    found = PREDICTIONS[mode](logits, retain_logits, temperature=scale)
    np.testing.assert_allclose(found, expected, atol=1e-6 / temperature, rtol=1e-6)
    extremes = 1e30 * rng.choice([-1.0, 1.0], size=(2, 20, 4)).astype("float32")
    assert np.isfinite(PREDICTIONS[mode](*extremes, temperature=scale)).all()


def test_sampled_is_the_mean_over_hard_masks(rng):
    logits = np.log([[0.5, 0.3, 0.2]])

    def drawn(retain_logits, seed):
        log_p = functional.sampled_log_probabilities(logits, [retain_logits], 1, (seed, 2))
        return tuple(np.exp(log_p).round(8)[0])

    half = np.array([50.0, 0.0, -50.0])  # keeps the first class, half of the time the second
    assert {drawn(half, seed) for seed in range(20)} == {(1, 0, 0), (0.625, 0.375, 0)}
    assert drawn(np.full(3, -50.0), 0) == pytest.approx([1 / 3] * 3)  # No mask is 1.
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
def test_predictions_under_xla(rng, mode):
    def prediction_and_gradient(o, r):
        with tf.GradientTape() as tape:
            tape.watch(o)
            log_p = PREDICTIONS[mode](o, r)
            value = log_p[:, 0]
        return log_p, tape.gradient(value, o)

    arguments = [tf.constant(rng.normal(size=(4, 5))) for _ in range(2)]
    if mode == "sampled":
        arguments[1] += 50.0  # XLA draws other numbers. Here every draw keeps every class.
    compiled = tf.function(prediction_and_gradient, jit_compile=True)(*arguments)
    for one, other in zip(compiled, prediction_and_gradient(*arguments), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


def test_logits_are_shift_invariant(rng):
    logits, retain_logits, masks = rng.normal(size=(3, 6, 5))
    scores = {"scores": lambda o, r: functional.prior_scores_and_entropy(o, r, masks)[0]}
    for name, function in {**PREDICTIONS, **scores}.items():
        expected = function(logits, retain_logits)
        for shift in [1e3, -1e6]:
            shifted = function(logits + shift, retain_logits)
            np.testing.assert_allclose(shifted, expected, atol=1e-8, err_msg=name)


def test_a_hundred_thousand_classes(rng):
    logits, retain_logits, masks = rng.normal(size=(3, 2, 100_000)).astype("float32")
    log_p = {name: function(logits, 3 * retain_logits) for name, function in PREDICTIONS.items()}
    for name, found in log_p.items():
        sums = np.exp(found.numpy().astype("float64")).sum(-1)
        np.testing.assert_allclose(sums, 1, atol=1e-4, err_msg=name)
    # With so many classes, the expectation is close to the expected masks.
    np.testing.assert_allclose(log_p["exact"], log_p["expected"], atol=5e-3)
    scores, gradients = value_and_gradients(
        lambda *arguments: functional.prior_scores_and_entropy(*arguments)[0],
        logits,
        retain_logits,
        masks,
    )
    for found in (scores, *gradients):
        assert np.isfinite(found).all()
