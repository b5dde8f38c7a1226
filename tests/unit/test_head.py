"""The layer by itself: construction, weights, shapes, objective, randomness, precision."""

import random

import keras
import numpy as np
import oracles
import pytest
import tensorflow as tf
from keras.src.testing import TestCase
from scipy import stats

import tf_dropmax
from tf_dropmax import DropMaxHead, DropMaxLoss, functional, set_predict_mode
from tf_dropmax.objectives import PriorMasks

MODES = ["expected", "sampled", "exact", "softmax"]


def selecting_head(classes, **kwargs):
    """A head whose features are the logits and the retain logits, side by side."""
    select = np.eye(2 * classes)
    return DropMaxHead(
        classes,
        kernel_initializer=keras.initializers.Constant(select[:, :classes]),
        retain_kernel_initializer=keras.initializers.Constant(select[:, classes:]),
        **kwargs,
    )


def real_path(
    monkeypatch, logits, retain_logits, uniform, labels, entropy_weight, temperature, dtype
):
    """Value and gradients by the head in training, `add_loss` and the loss, for given draws."""
    monkeypatch.setattr(
        functional, "uniform_draws", lambda shape, seed, dtype: tf.constant(uniform, dtype)
    )
    head = selecting_head(
        logits.shape[1], entropy_weight=entropy_weight, temperature=temperature, dtype=dtype
    )
    features = tf.constant(np.concatenate([logits, retain_logits], axis=1), dtype)
    with tf.GradientTape() as tape:
        tape.watch(features)
        scores = head(features, training=True)
        assert len(head.losses) == 1
        value = DropMaxLoss(dtype=dtype)(labels, scores) + head.losses[0]
    assert scores.dtype == dtype
    return value.numpy(), np.split(tape.gradient(value, features).numpy(), 2, axis=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_objective_is_eq_15(rng, monkeypatch, dtype, tolerance):
    logits, retain_logits = 3 * rng.normal(size=(10, 5)), 3 * rng.normal(size=(10, 5))
    arguments = (rng.uniform(0.01, 0.99, size=(10, 5)), rng.integers(5, size=10), 0.7, 0.2)
    value, (grad_logits, grad_retain) = real_path(
        monkeypatch, logits, retain_logits, *arguments, dtype
    )
    assert value == pytest.approx(
        oracles.objective(logits, retain_logits, *arguments), rel=tolerance
    )
    differences = oracles.central_differences(
        lambda o: oracles.objective(o, retain_logits, *arguments), logits, 1e-5
    )
    np.testing.assert_allclose(grad_logits, differences, atol=1e-6)
    differences = oracles.central_differences(
        lambda r: oracles.objective(logits, r, *arguments), retain_logits, 1e-5
    )
    np.testing.assert_allclose(grad_retain, differences, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_golden_objective(golden, monkeypatch, dtype, tolerance):
    names = ("logits", "retain_logits", "uniform", "labels")
    settings = (float(golden["lam"]), float(golden["tau"]))
    value, gradients = real_path(monkeypatch, *(golden[name] for name in names), *settings, dtype)
    assert value == pytest.approx(float(golden["objective"]), rel=tolerance)
    np.testing.assert_allclose(gradients, [golden["grad_logits"], golden["grad_retain"]], atol=1e-6)


def three_branch_head(classes, **kwargs):
    """A head whose features are logits, retain logits and auxiliary logits, side by side."""
    head = DropMaxHead(classes, posterior="label", **kwargs)
    head.build((None, 3 * classes))
    kernels = np.split(np.eye(3 * classes), 3, axis=1)
    for kernel, value in zip(
        (head.kernel, head.retain_kernel, head.auxiliary_kernel), kernels, strict=True
    ):
        kernel.assign(value)
    return head


def label_path(
    monkeypatch, branches, uniform, labels, entropy_weight, auxiliary_weight, temperature, dtype
):
    monkeypatch.setattr(
        functional, "uniform_draws", lambda shape, seed, dtype: tf.constant(uniform, dtype)
    )
    settings = {
        "entropy_weight": entropy_weight,
        "auxiliary_weight": auxiliary_weight,
        "temperature": temperature,
    }
    head = three_branch_head(branches[0].shape[1], dtype=dtype, **settings)
    features = tf.constant(np.concatenate(branches, axis=1), dtype)
    with tf.GradientTape() as tape:
        tape.watch(features)
        value = DropMaxLoss(dtype=dtype)(labels, head(features, training=True)) + head.losses[0]
    return value.numpy(), np.split(tape.gradient(value, features).numpy(), 3, axis=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_label_posterior_objective(rng, monkeypatch, dtype, tolerance):
    o, r, a = branches = 2 * rng.normal(size=(3, 8, 5))
    arguments = (rng.uniform(0.01, 0.99, size=(8, 5)), rng.integers(5, size=8), 0.7, 0.4, 0.2)
    value, gradients = label_path(monkeypatch, branches, *arguments, dtype)
    assert value == pytest.approx(oracles.label_objective(o, r, a, *arguments), rel=tolerance)
    by_o = oracles.central_differences(
        lambda o: oracles.label_objective(o, r, a, *arguments), o, 1e-5
    )
    by_a = oracles.central_differences(
        lambda a: oracles.label_objective(o, r, a, *arguments), a, 1e-5
    )
    np.testing.assert_allclose(gradients[2], by_a, atol=1e-6)

    # The prior within the posterior is held fixed. If r grows and a falls by as much, the posterior
    # does not move. Only the prior and the loss of the auxiliary classifier move. That loss is all
    # that depends on a alone.
    def auxiliary(a):
        s, y = oracles.sigmoid(a), arguments[1]
        target = np.eye(5)[y]
        return -arguments[3] * np.sum(np.where(target, np.log(s), np.log(1 - s))) / 8

    together = oracles.central_differences(
        lambda x: oracles.label_objective(o, x, a + r - x, *arguments), r, 1e-5
    )
    alone = oracles.central_differences(lambda x: auxiliary(a + r - x), r, 1e-5)
    np.testing.assert_allclose(gradients[1], together - alone, atol=1e-6)
    np.testing.assert_allclose(gradients[0], by_o, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_golden_label_objective(golden, monkeypatch, dtype, tolerance):
    branches = [golden[name] for name in ("logits", "retain_logits", "auxiliary_logits")]
    arguments = (
        golden["uniform"],
        golden["labels"],
        float(golden["lam"]),
        1.0,
        float(golden["tau"]),
    )
    value, gradients = label_path(monkeypatch, branches, *arguments, dtype)
    assert value == pytest.approx(float(golden["label_objective"]), rel=tolerance)
    for gradient, name in zip(gradients, ("logits", "retain", "auxiliary"), strict=True):
        np.testing.assert_allclose(gradient, golden[f"label_grad_{name}"], atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_label_posterior_without_masks_trains_on_their_means(rng, dtype, tolerance):
    branches = 2 * rng.normal(size=(3, 8, 5))
    labels, settings = rng.integers(5, size=8), (0.7, 0.3)
    head = three_branch_head(
        5, stochastic=False, entropy_weight=0.7, auxiliary_weight=0.3, dtype=dtype
    )
    features = tf.constant(np.concatenate(branches, axis=1), dtype)
    before = [generator.state.numpy() for generator in (head._train_seeds, head._predict_seeds)]
    with tf.GradientTape() as tape:
        tape.watch(features)
        value = DropMaxLoss(dtype=dtype)(labels, head(features, training=True)) + head.losses[0]
    gradients = np.split(tape.gradient(value, features).numpy(), 3, axis=1)
    o, r, a = branches

    def objective(o, a):
        return oracles.label_objective(o, r, a, [None] * 8, labels, *settings, 0.1)

    assert value.numpy() == pytest.approx(objective(o, a), rel=tolerance)
    by_logits = oracles.central_differences(lambda o: objective(o, a), o, 1e-5)
    by_auxiliary = oracles.central_differences(lambda a: objective(o, a), a, 1e-5)
    np.testing.assert_allclose(gradients[0], by_logits, atol=1e-6)
    np.testing.assert_allclose(gradients[2], by_auxiliary, atol=1e-6)
    after = [generator.state.numpy() for generator in (head._train_seeds, head._predict_seeds)]
    np.testing.assert_array_equal(after, before)  # It needs no random numbers.
    with pytest.raises(ValueError, match="relaxed masks"):
        head.mask_distribution(features)


def test_label_posterior_predicts_by_the_prior_alone(rng):
    head = DropMaxHead(3, posterior="label", seed=1)
    features = rng.normal(size=(5, 4)).astype("float32")
    before = head(features).numpy()
    assert [w.name for w in head.weights][-2:] == ["auxiliary_kernel", "auxiliary_bias"]
    head.auxiliary_kernel.assign(rng.normal(size=(4, 3)))
    np.testing.assert_allclose(
        head.mask_distribution(features).logits_parameter(),
        features @ (head.retain_kernel + head.auxiliary_kernel).numpy(),
        atol=1e-5,
    )
    np.testing.assert_array_equal(head(features), before)


def test_golden_predictions(golden):
    features = np.concatenate([golden["logits"], golden["retain_logits"]], axis=1).astype("float32")
    for mode in ["expected", "exact", "softmax"]:
        head = selecting_head(golden["logits"].shape[1], predict_mode=mode)
        np.testing.assert_allclose(np.exp(head(features)), golden[mode], atol=1e-5)


def test_deterministic_attention_trains_on_eq_18(rng):
    logits, retain_logits, labels = (
        rng.normal(size=(6, 4)),
        rng.normal(size=(6, 4)),
        np.arange(6) % 4,
    )
    features = np.concatenate([logits, retain_logits], axis=1)
    head = selecting_head(4, stochastic=False, entropy_weight=0.5, dtype="float64")
    value = DropMaxLoss(dtype="float64")(labels, head(features, training=True)) + head.losses[0]
    expected = 0.0
    for o, r, y in zip(logits, retain_logits, labels, strict=True):
        rho = oracles.sigmoid(r)
        h = -rho * np.log(rho) - (1 - rho) * np.log(1 - rho)
        expected -= np.log(rho[y] * np.exp(o[y]) / np.sum(rho * np.exp(o))) + 0.5 * (h.sum() - h[y])
    assert value.numpy() == pytest.approx(expected / 6, rel=1e-12)


def test_random_dropmax_has_no_retain_branch_and_no_entropy(rng):
    features = rng.normal(size=(5000, 3)).astype("float32")
    head = DropMaxHead(4, retain_probability=0.3, kernel_initializer="zeros", seed=1)
    scores = head(features, training=True)
    assert [w.name for w in head.weights] == ["kernel", "bias"]
    assert head.losses == []
    # With equal logits, a target competes with a binomial number of the 3 others.
    counts = np.bincount((1 / np.exp(scores[:, 0])).round().astype(int), minlength=5)[1:]
    assert (
        stats.chisquare(counts, 5000 * stats.binom.pmf(range(4), 3, 0.3)).pvalue > 1e-4
    )  # the seed is fixed
    for function in [head.retain_probabilities, tf.function(head.retain_probabilities)]:
        np.testing.assert_allclose(function(features), np.full((5000, 4), 0.3), rtol=1e-6)
    for mode in ["expected", "softmax", "exact"]:
        set_predict_mode(head, mode)
        np.testing.assert_allclose(np.exp(head(features[:9])), 0.25, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("training", [False, True])
def test_shapes_dtype_and_names(shape, training):
    head = DropMaxHead(7)
    outputs = head(np.ones(shape, "float32"), training=training)
    assert outputs.shape == (*shape[:-1], 7)
    assert outputs.dtype == "float32"
    assert head.compute_output_shape(shape) == outputs.shape
    assert {w.name: tuple(w.shape) for w in head.weights} == {
        "kernel": (5, 7),
        "bias": (7,),
        "retain_kernel": (5, 7),
        "retain_bias": (7,),
    }
    symbolic = DropMaxHead(7)(keras.Input(shape[1:]))
    assert (symbolic.shape, symbolic.dtype) == ((None, *shape[1:-1], 7), "float32")
    assert len(head.losses) == training


def test_without_bias():
    head = DropMaxHead(3, use_bias=False)
    head.build((None, 2))
    assert [w.name for w in head.weights] == ["kernel", "retain_kernel"]
    assert head.bias is None
    assert head.retain_bias is None


def test_entropy_loss_value_and_mask(rng):
    features = rng.normal(size=(2, 3, 4)).astype("float32")
    mask = np.array([[True, False, True], [False, False, True]])
    head = DropMaxHead(5, entropy_weight=0.25)
    head(features, training=True, mask=mask)
    rho = oracles.sigmoid(features @ head.retain_kernel.numpy())
    h = np.sum(-rho * np.log(rho) - (1 - rho) * np.log(1 - rho), axis=-1)
    assert head.losses[0].numpy() == pytest.approx(-0.25 * h[mask].mean(), rel=1e-5)
    head(features, training=True)
    assert head.losses[-1].numpy() == pytest.approx(-0.25 * h.mean(), rel=1e-5)
    empty = DropMaxHead(5)
    empty(features, training=True, mask=np.zeros((2, 3), bool))
    assert empty.losses[0].numpy() == 0


def test_retain_probabilities_and_mask_distribution(rng):
    features = rng.normal(size=(6, 3)).astype("float32")
    head = DropMaxHead(4, temperature=0.5, retain_bias_initializer="ones")
    distribution = head.mask_distribution(features)
    rho = oracles.sigmoid(features @ head.retain_kernel.numpy() + 1)
    np.testing.assert_allclose(head.retain_probabilities(features), rho, atol=1e-6)
    np.testing.assert_allclose(tf.sigmoid(distribution.logits_parameter()), rho, atol=1e-6)
    assert distribution.temperature.numpy() == 0.5
    assert distribution.batch_shape == (6, 4)
    for head in [DropMaxHead(4, retain_probability=0.5), DropMaxHead(4, stochastic=False)]:
        with pytest.raises(ValueError, match="relaxed masks"):
            head.mask_distribution(features)


def test_modes_of_the_head_are_those_of_functional(rng):
    logits, retain_logits = rng.normal(size=(2, 6, 5)).astype("float32")
    head = selecting_head(5)
    features = np.concatenate([logits, retain_logits], axis=1)
    for mode in ["expected", "exact"]:
        set_predict_mode(head, mode)
        np.testing.assert_allclose(
            head(features),
            getattr(functional, f"{mode}_log_probabilities")(logits, retain_logits),
            atol=1e-6,
        )
    set_predict_mode(head, "softmax")
    np.testing.assert_allclose(
        head(features), functional.softmax_log_probabilities(logits), atol=1e-6
    )
    set_predict_mode(head, "sampled", 1000)
    call = tf.function(head)
    sampled = np.exp(call(features))
    np.testing.assert_allclose(
        sampled, np.exp(functional.exact_log_probabilities(logits, retain_logits)), atol=0.08
    )
    assert np.abs(sampled - np.exp(call(features))).max() > 1e-5  # the next draws are others


def test_masks_differ_between_steps_examples_and_positions():
    head = DropMaxHead(6, seed=3)
    features = np.ones((4, 5, 3), "float32")
    first, second = head(features, training=True).numpy(), head(features, training=True).numpy()
    rows = np.concatenate([first, second]).reshape(-1, 6)
    assert len(np.unique(rows, axis=0)) == len(rows) == 40


@pytest.mark.parametrize(("units", "proportion"), [(2, 1), (30, 1), (900, 1 / 30)])
def test_the_posterior_starts_closer_to_the_prior_with_many_classes(units, proportion):
    """Standard deviation of 100 x 2 weights or more: 5 % at one sigma."""
    kernels = []
    for seed in (1, 1, 2):
        head = DropMaxHead(units, posterior="label", seed=seed)
        head.build((None, 100))
        kernels.append(head.auxiliary_kernel.numpy())
        assert not np.any(head.auxiliary_bias)
    assert kernels[0].var() == pytest.approx(2 / (100 + units) * proportion**2, rel=0.3)
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.allclose(kernels[0], kernels[2])
    assert not np.allclose(kernels[0], head.retain_kernel)


def test_one_seed_makes_training_reproducible(blobs):
    x, y = blobs

    def train(seed):
        model = keras.Sequential([keras.Input((6,)), DropMaxHead(4, seed=seed)])
        model.compile("adam", DropMaxLoss())
        history = model.fit(x, y, epochs=2, batch_size=32, shuffle=False, verbose=0)
        return history.history["loss"], model.get_weights()

    state, python_state = np.random.get_state()[1].copy(), random.getstate()
    DropMaxHead(4, seed=5, posterior="label").build((None, 6))
    assert random.getstate() == python_state
    (loss, weights), (loss_again, weights_again), (other_loss, other) = train(5), train(5), train(6)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert loss == loss_again
    assert all(np.array_equal(a, b) for a, b in zip(weights, weights_again, strict=True))
    assert loss != other_loss
    assert not np.allclose(weights[0], other[0])
    assert not np.allclose(weights[0], weights[2])  # the two kernels do not share their seed


def test_seed_leaves_initializers_with_a_seed_alone():
    initializer = keras.initializers.GlorotNormal(seed=11)
    heads = [DropMaxHead(3, seed=seed, kernel_initializer=initializer) for seed in (1, 2)]
    for head in heads:
        head.build((None, 4))
    np.testing.assert_array_equal(*[head.kernel.numpy() for head in heads])


def test_unseeded_heads_differ():
    heads = [
        DropMaxHead(3, kernel_initializer="zeros", retain_kernel_initializer="zeros")
        for _ in range(2)
    ]
    scores = [head(np.ones((2, 4), "float32"), training=True).numpy() for head in heads]
    assert not np.allclose(*scores)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("size", [10.0, 1e4])
def test_mixed_precision_is_finite(rng, policy, size):
    logits, retain_logits = size * rng.uniform(-1, 1, size=(2, 40, 5))
    logits[0], retain_logits[1] = size, -size
    keras.mixed_precision.set_dtype_policy(policy)
    features = tf.constant(np.concatenate([logits, retain_logits], axis=1), "float32")
    head = selecting_head(5)
    with tf.GradientTape() as tape:
        tape.watch(features)
        scores = head(features, training=True)
        loss = DropMaxLoss()(np.arange(40) % 5, scores) + sum(head.losses)
    gradients = tape.gradient(loss, [features, *head.trainable_variables])
    assert scores.dtype == "float32"
    assert head.kernel.dtype == "float32"
    assert all(np.isfinite(t).all() for t in [scores, loss, *gradients])
    for mode in MODES:
        set_predict_mode(head, mode)
        log_p = head(features)
        assert log_p.dtype == "float32"
        np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, atol=1e-5)
    if size == 10:  # the matrix products, and nothing else, are in half precision
        reference = functional.expected_log_probabilities(logits, retain_logits)
        set_predict_mode(head, "expected")
        np.testing.assert_allclose(
            head(features), reference, atol=0.3 if policy == "mixed_bfloat16" else 0.03
        )


def test_from_dense_starts_where_the_classifier_was(rng):
    features = rng.normal(size=(20, 4)).astype("float32")
    for activation in [None, "softmax"]:
        dense = keras.layers.Dense(
            3, activation=activation, bias_initializer="ones", kernel_regularizer="l2"
        )
        expected = dense(features).numpy()
        if activation is None:
            expected = tf.nn.softmax(expected).numpy()
        head = DropMaxHead.from_dense(dense, seed=1, entropy_weight=0.1)
        np.testing.assert_allclose(np.exp(head(features)), expected, atol=1e-6)
        np.testing.assert_allclose(head.retain_probabilities(features), 0.5)
        assert head.entropy_weight == 0.1
        assert isinstance(head.kernel_regularizer, keras.regularizers.L2)
        head.kernel.assign(head.kernel * 2)
        assert not np.allclose(head.kernel, dense.kernel)
    bare = keras.layers.Dense(3, use_bias=False)
    bare.build((None, 4))
    assert len(DropMaxHead.from_dense(bare, retain_probability=0.4).weights) == 1


def test_from_dense_refuses_what_it_cannot_start_from():
    with pytest.raises(TypeError, match="Dense"):
        DropMaxHead.from_dense(keras.layers.Conv1D(3, 1))
    with pytest.raises(ValueError, match="built"):
        DropMaxHead.from_dense(keras.layers.Dense(3))
    dense = keras.layers.Dense(3, activation="relu")
    dense.build((None, 4))
    with pytest.raises(ValueError, match="relu"):
        DropMaxHead.from_dense(dense)
    dense = keras.layers.Dense(3)
    dense.build((None, 4))
    with pytest.raises(ValueError, match="units"):
        DropMaxHead.from_dense(dense, units=4)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"units": value} for value in (0, -1, 2.0, "3", None, True)),
        *(
            {"retain_probability": value}
            for value in (0, 1, 0.0, 1.0, -0.1, 1.5, np.nan, "0.5", True)
        ),
        *({"temperature": value} for value in (0, 1e-7, -0.1, np.nan, np.inf, "0.1", None)),
        *({"entropy_weight": value} for value in (-1e-9, 1e8, np.nan, np.inf, "1")),
        *({"predict_mode": value} for value in ("mean", None, 0)),
        *({"predict_samples": value} for value in (0, -1, 1.5, None)),
        *({"seed": value} for value in (1.5, "1", True)),
        {"stochastic": "no"},
        {"use_bias": 1},
        {"retain_probability": 0.5, "stochastic": False},
        {"posterior": "both"},
        {"posterior": "label", "retain_probability": 0.5},
        *({"auxiliary_weight": value} for value in (-1, 1e8, np.inf, "1")),
    ],
    ids=str,
)
def test_bad_arguments(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises((ValueError, TypeError), match=f"(?s){name}.*Received.*{value}") as error:
        DropMaxHead(**{"units": 3, **arguments})
    assert "must be" in str(error.value) or "needs" in str(error.value)


def test_bad_inputs():
    for dtype in ["int32", "int64", "uint8", "bool"]:
        with pytest.raises(ValueError, match=f"floating point.*{dtype}"):
            DropMaxHead(3)(np.ones((2, 4), dtype))
        with pytest.raises(ValueError, match=f"floating point.*{dtype}"):
            DropMaxHead(3)(keras.Input((4,), dtype=dtype))
        for head in [DropMaxHead(3), DropMaxHead(3, retain_probability=0.5)]:
            with pytest.raises(ValueError, match="floating point"):
                head.retain_probabilities(np.ones((2, 4), dtype))
    with pytest.raises(ValueError, match="last dimension"):
        DropMaxHead(3)(keras.Input((None,)))
    with pytest.raises(ValueError, match="min_ndim=2"):
        DropMaxHead(3)(np.ones(4, "float32"))
    head = DropMaxHead(3)
    head.build((None, 4))
    with pytest.raises(ValueError, match=r"last dimension 4.*\(2, 5\)"):
        head.retain_probabilities(np.ones((2, 5), "float32"))


def test_numpy_numbers_are_welcome():
    head = DropMaxHead(
        np.int64(3), temperature=np.float32(0.5), entropy_weight=np.int32(1), seed=np.int64(2)
    )
    assert tf_dropmax.DropMaxHead.from_config(head.get_config()).units == 3
    assert type(head.get_config()["units"]) is int


def test_two_classes_and_one():
    for units in (1, 2):
        head = DropMaxHead(units)
        scores = head(np.ones((3, 4), "float32"), training=True)
        assert np.isfinite(scores).all()
        np.testing.assert_allclose(np.exp(head(np.ones((3, 4), "float32"))).sum(-1), 1, rtol=1e-6)


VARIANTS = [
    {},
    {"posterior": "label"},
    {"posterior": "label", "stochastic": False},
    {"stochastic": False},
    {"retain_probability": 0.4},
]


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning")
@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_keras_own_layer_test(kwargs):
    """Keras builds, calls, trains, saves, loads and serializes the layer under several dtypes."""
    branches = {"retain_probability": 1, "posterior": 3}.get(next(iter(kwargs), ""), 2)
    TestCase().run_layer_test(
        DropMaxHead,
        init_kwargs={"units": 4, "seed": 1, **kwargs},
        input_shape=(3, 5),
        expected_output_shape=(3, 4),
        expected_num_trainable_weights=2 * branches,
        expected_num_non_trainable_weights=0,
        expected_num_seed_generators=2,
        expected_num_losses=None,  # Keras would count those of inference.
        supports_masking=True,
    )


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_keras_own_serialization_test(kwargs, mode):
    TestCase().run_class_serialization_test(DropMaxHead(4, predict_mode=mode, **kwargs))


def test_flags_of_numpy_are_flags():
    head = DropMaxHead(3, stochastic=np.bool_(False), use_bias=np.True_)
    assert (head.stochastic, head.use_bias) == (False, True)
    assert type(head.get_config()["stochastic"]) is bool


def test_no_log_probability_is_zero():
    """Metrics of Keras skip entries that are 0."""
    for dtype, largest in [("float32", -(2.0**-24)), ("float64", np.log1p(-(2.0**-29)))]:
        for mode in MODES:
            head = selecting_head(3, dtype=dtype, predict_mode=mode)
            sure = tf.constant([[90.0, -90.0, -90.0, 50.0, 50.0, 50.0]], dtype)
            log_p = head(sure).numpy()
            assert log_p.max() == pytest.approx(largest, rel=1e-6)
    assert (
        np.float32(1)
        > np.exp(np.float32(-(2.0**-24)))
        == np.nextafter(np.float32(1), np.float32(0))
    )


def test_outputs_of_a_second_call(rng):
    features = rng.normal(size=(6, 3)).astype("float32")
    head = DropMaxHead(4, seed=1)
    head.build(features.shape)
    logits = features @ head.kernel.numpy()
    for training in (False, True):
        np.testing.assert_allclose(head(features, training=training, output="logits"), logits)
    assert head.losses == []
    symbolic = head(keras.Input((3,)), output="logits")
    assert (symbolic.shape, symbolic.dtype) == ((None, 4), "float32")


def test_seeds_of_streams_and_branches_are_unrelated():
    """Not those of the same head, and not those of a head with a neighbouring seed."""
    drawn = []
    for seed in (0, 1, 2, -1, 2**70):
        head = DropMaxHead(3, posterior="label", seed=seed)
        head.build((None, 4))
        kernels = (head.kernel, head.retain_kernel, head.auxiliary_kernel)
        # The auxiliary kernel has another scale.
        drawn += [tuple(np.sign(kernel.numpy()).ravel()) for kernel in kernels]
        states = (head._train_seeds.state, head._predict_seeds.state)
        drawn += [tuple(state.numpy()) for state in states]
    assert len(set(drawn)) == len(drawn)


def test_a_further_branch_starts_unlike_the_retain_branch():
    class Gated(PriorMasks):
        branches = ("retain", "gate")

    class GatedHead(DropMaxHead):
        def _make_objective(self):
            return Gated()

    for seed in (0, None):
        head = GatedHead(3, seed=seed)
        head.build((None, 4))
        ratio = head.gate_kernel.numpy() / head.retain_kernel.numpy()
        assert ratio.std() > 0.1


@pytest.mark.parametrize(
    "initializer",
    [
        "glorot_uniform",
        keras.initializers.GlorotUniform,
        {"class_name": "GlorotUniform", "config": {"seed": None}},
    ],
)
def test_initializers_without_a_seed_leave_the_global_stream_alone(initializer):
    random.seed(1)
    expected = random.random()
    random.seed(1)
    heads = [DropMaxHead(3, seed=5, kernel_initializer=initializer) for _ in range(2)]
    assert random.random() == expected
    for head in heads:
        head.build((None, 4))
    np.testing.assert_array_equal(*(head.kernel.numpy() for head in heads))


def test_what_weights_depend_on_cannot_be_set():
    head = DropMaxHead(3)
    for name, value in (("units", 4), ("posterior", "label"), ("use_bias", False), ("seed", 2)):
        with pytest.raises(AttributeError, match=f"`{name}` cannot be set.*Received: {name}="):
            setattr(head, name, value)
    assert head.get_config()["posterior"] == "prior"


def test_methods_that_need_values_name_the_symbolic_way():
    with pytest.raises(ValueError, match=r'can: `head\(x, output="retain_probabilities"\)`'):
        DropMaxHead(3).retain_probabilities(keras.Input((4,)))
