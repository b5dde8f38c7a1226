"""What must hold for whatever comes in: many examples, made by hypothesis.

The examples of a test run are always the same. `HYPOTHESIS_PROFILE=long` tries hundreds of others.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from models import MODES, VARIANTS
from predictions import PREDICTIONS

from tf_dropmax import DropMaxHead, functional, set_predict_mode

pytestmark = pytest.mark.slow

LIMIT = float(np.float32(1e30))
# Compiled, because the loops of some modes take long if Python runs them.
COMPILED = {
    name: tf.function(function, reduce_retracing=True) for name, function in PREDICTIONS.items()
}


@st.composite
def values(draw, shape, dtype):
    """An array with entries up to +-1e30. A large one follows one of several laws."""
    if np.prod(shape) <= 30 and draw(st.booleans()):
        some = st.floats(-LIMIT, LIMIT, width=32, allow_subnormal=False) | st.sampled_from(
            [0.0, -0.0, 80.0, -88.0, 88.75, -104.0, LIMIT, -LIMIT]
        )
        return draw(hnp.arrays(np.float32, shape, elements=some)).astype(dtype)
    scale = 10.0 ** draw(st.integers(-3, 30))
    noise = np.random.default_rng(draw(st.integers(0, 2**32))).normal(size=shape)
    law = draw(st.sampled_from(["normal", "two values", "one value", "one above", "one below"]))
    x = {
        "normal": noise,
        "two values": np.sign(noise),
        "one value": np.sign(noise[:1, :1]) + 0 * noise,
        "one above": (np.arange(shape[-1]) == shape[-1] // 2) + 0 * noise,
        "one below": -1.0 * (np.arange(shape[-1]) == 0) + 0 * noise,
    }[law]
    return np.clip(scale * x, -LIMIT, LIMIT).astype(dtype)


@st.composite
def problems(draw, arrays):
    """Arrays `(rows, T)` of logits and the like."""
    few, many = st.integers(1, 12), st.sampled_from([16, 33, 100, 257, 1000, 5000])
    shape = (draw(st.integers(1, 3)), draw(few | many))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    return [draw(values(shape, dtype)) for _ in range(arrays)]


def with_gradients(function, arrays):
    """The result, and the gradients of a sum of it with weights of both signs.

    From every second row only one class has a weight, as in the loss of a label.
    """
    variables = [tf.constant(array) for array in arrays]
    with tf.GradientTape() as tape:
        tape.watch(variables)
        result = function(*variables)
        weights = tf.cast(np.cos(np.arange(result.shape[-1])), result.dtype)
        total = tf.reduce_sum(weights * result[::2]) + tf.reduce_sum(result[1::2, 0])
    return result.numpy(), tape.gradient(total, variables, unconnected_gradients="zero")


@pytest.mark.parametrize("mode", PREDICTIONS)
@given(problem=problems(arrays=2))
def test_modes_give_probabilities(mode, problem):
    log_p, gradients = with_gradients(COMPILED[mode], problem)
    assert np.isfinite(log_p).all()
    p = np.exp(log_p.astype("float64"))
    assert (p <= 1 + 1e-5).all()
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
    for gradient in gradients:
        assert np.isfinite(gradient).all()


def relaxed(mask_logits, temperature):
    uniform = functional.uniform_draws(tf.shape(mask_logits), (3, 4), mask_logits.dtype)
    return functional.relaxed_mask_logits(mask_logits, uniform, temperature)


def random_scores(o, retain_probability):
    uniform = functional.uniform_draws(tf.shape(o), (3, 4), o.dtype)
    masks = functional.bernoulli_mask_logits(retain_probability, uniform)
    return functional.target_log_likelihood(o, masks)


# Functions of logits, retain logits, auxiliary logits, and the settings that are drawn.
SCORES = {
    "prior": lambda o, r, a, weight, temperature, _: functional.prior_scores_and_entropy(
        o, r, relaxed(r, temperature), weight
    )[0],
    "label": lambda o, r, a, weight, temperature, _: functional.label_scores_and_entropy(
        o, r, a, relaxed(functional.posterior_logits(r, a), temperature), weight
    )[0],
    "attention": lambda o, r, a, weight, *_: (
        functional.expected_log_probabilities(o, r) - weight * functional.mask_entropy(r)
    ),
    "random": lambda o, r, a, weight, temperature, rho: random_scores(o, rho),
}


@pytest.mark.parametrize("name", SCORES)
@given(
    problem=problems(arrays=3),
    weight=st.sampled_from([0.0, 1e-4, 1.0, 100.0]),
    temperature=st.sampled_from([0.01, 0.1, 1.0]),
    rho=st.sampled_from([1e-6, 0.2, 0.6, 1 - 1e-6]),
)
def test_scores_are_finite(name, problem, weight, temperature, rho):
    result, gradients = with_gradients(
        lambda *arrays: SCORES[name](*arrays, weight, temperature, rho), problem
    )
    assert np.isfinite(result).all()
    assert (result <= 1e-5).all()  # log-probabilities, less entropies and divergences
    for gradient in gradients:
        assert np.isfinite(gradient).all()


@given(
    problem=problems(arrays=2),
    which=st.integers(0, 1),
    step=st.sampled_from([1e-3, 0.5, 5.0, 100.0, LIMIT]),
    data=st.data(),
)
def test_exact_is_monotone(problem, which, step, data):
    """A larger logit or retain logit of a class makes it more probable, and others less probable.

    For the class itself: given the other masks, with sum of weights S, its probability is
    w / (w + S) if it is kept. If it is dropped, it is 1 / T where S = 0 and 0 elsewhere. For
    another class, one more competitor never helps.
    """
    more = [array.copy() for array in problem]
    chosen = data.draw(st.integers(0, problem[0].shape[-1] - 1))
    more[which][:, chosen] = np.minimum(more[which][:, chosen] + step, LIMIT)
    before, after = (
        np.exp(COMPILED["exact"](*arrays).numpy().astype("float64")) for arrays in (problem, more)
    )
    difference = after - before
    assert (difference[:, chosen] >= -2e-5).all()
    assert (np.delete(difference, chosen, axis=-1) <= 2e-5).all()


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)
@given(
    policy=st.sampled_from(
        ["float32", "mixed_bfloat16", "mixed_float16", "float16", "bfloat16", "float64"]
    ),
    shape=st.sampled_from([(1, 3), (4, 7), (2, 3, 5), (2, 1, 2, 4)]),
    units=st.integers(2, 40),
    exponent=st.integers(-3, 3),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=settings.default.max_examples // 4)
def test_heads(kwargs, policy, shape, units, exponent, seed):
    head = DropMaxHead(units, dtype=policy, seed=seed, **kwargs)
    features = np.random.default_rng(seed).normal(size=shape).astype("float32") * 10.0**exponent
    features = tf.cast(features, head.compute_dtype)
    head.build(features.shape)
    labels = tf.zeros(shape[:-1], tf.int32)
    with tf.GradientTape() as tape:
        tape.watch(features)
        scores = head(features, training=True)
        loss = -tf.reduce_mean(tf.gather(scores, labels, axis=-1, batch_dims=len(shape) - 1)) + sum(
            tf.cast(added, scores.dtype) for added in head.losses
        )
    gradients = tape.gradient(
        loss, [features, *(weight.value for weight in head.trainable_weights)]
    )
    wide = "float64" if policy == "float64" else "float32"
    assert scores.dtype == wide
    assert np.isfinite(scores).all()
    for gradient in gradients:
        assert np.isfinite(tf.cast(gradient, wide)).all()
    for mode in MODES:
        set_predict_mode(head, mode)
        log_p = head(features)
        assert log_p.shape == (*shape[:-1], units)
        np.testing.assert_allclose(tf.reduce_sum(tf.exp(log_p), -1), 1, atol=1e-5)
    assert keras.config.floatx() == "float32"
