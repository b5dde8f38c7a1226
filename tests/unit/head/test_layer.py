"""The layer by itself: arguments, weights, shapes, precision, outputs, `from_dense`."""

import keras
import numpy as np
import oracles
import pytest
import tensorflow as tf
from keras.src.testing import TestCase
from models import DETERMINISTIC, GLOROT, MODES, VARIANTS, selecting_head

from tf_dropmax import DropMaxHead, DropMaxLoss, functional


def test_names_and_shapes_of_weights_and_outputs():
    head = DropMaxHead(7)
    symbolic = head(keras.Input((3, 5)))
    assert (symbolic.shape, symbolic.dtype) == ((None, 3, 7), "float32")
    assert head.compute_output_shape((2, 3, 5)) == (2, 3, 7)
    weights = {"/".join(w.path.split("/")[1:]): tuple(w.shape) for w in head.weights}
    assert weights == {
        "predict_temperatures": (4,),
        **{f"{branch}/kernel": (5, 7) for branch in ("classes", "retain")},
        **{f"{branch}/bias": (7,) for branch in ("classes", "retain")},
    }
    for training in (False, True):
        head(np.ones((2, 3, 5), "float32"), training=training)
        assert len(head.losses) == training


def test_the_branches_start_at_zero_and_the_logits_do_not():
    head = DropMaxHead(3, posterior="label")
    head.build((None, 4))
    at_zero = {name: not np.any(branch.kernel) for name, branch in head.branches.items()}
    assert at_zero == {"classes": False, "retain": True, "auxiliary": True}
    paper = DropMaxHead(3, posterior="label", retain=GLOROT)
    paper.build((None, 4))
    assert all(np.any(branch.kernel) for branch in paper.branches.values())


def test_arguments_of_dense_reach_the_branches():
    head = DropMaxHead(
        3,
        posterior="label",
        use_bias=False,
        kernel_regularizer="l2",
        retain={"kernel_constraint": "non_neg", "bias_initializer": "ones", "use_bias": True},
    )
    head.build((None, 2))
    classes, *others = head.branches.values()
    assert classes.bias is None
    assert isinstance(classes.kernel_regularizer, keras.regularizers.L2)
    for branch in others:
        assert branch.kernel_regularizer is None
        assert isinstance(branch.kernel_constraint, keras.constraints.NonNeg)
        np.testing.assert_array_equal(branch.bias, np.ones(3))
    bare = DropMaxHead(3, use_bias=False)
    bare.build((None, 2))
    assert [branch.bias for branch in bare.branches.values()] == [None, None]
    for kwargs, match in (
        ({"activation": "relu"}, "activation"),
        ({"retain": {"activation": "relu", "kernels": 1}}, "`retain` .*kernels"),
        ({"retain": "l2"}, "`retain` must be a dictionary .*Received: 'l2'"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            DropMaxHead(3, **kwargs)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"units": value} for value in (0, -1, 1, 2.0, "3", None, True)),
        *({"retain_probability": v} for v in (0, 1, 0.0, 1.0, -0.1, 1.5, np.nan, "0.5", True)),
        *({"temperature": value} for value in (0, 1e-7, -0.1, np.nan, np.inf, "0.1", None)),
        *({"entropy_weight": value} for value in (-1e-9, 1e8, np.nan, np.inf, "1", [1.0])),
        *({"warmup_steps": value} for value in (-1, 1e8, "soon")),
        *({"predict_mode": value} for value in ("mean", None, 0)),
        *({"predict_samples": value} for value in (0, -1, 1.5, None)),
        *({"seed": value} for value in (1.5, "1", True)),
        {"stochastic": "no"},
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
    with pytest.raises(ValueError, match="shape"):
        DropMaxHead(3)(keras.Input((None,)))
    with pytest.raises(ValueError, match="min_ndim=2"):
        DropMaxHead(3)(np.ones(4, "float32"))
    head = DropMaxHead(3)
    head.build((None, 4))
    for ask in (head, head.retain_probabilities, head.uncertainty, head.mask_distribution):
        with pytest.raises(ValueError, match=r"axis -1 of input shape to have value 4.*\(2, 5\)"):
            ask(np.ones((2, 5), "float32"))


def test_numbers_and_flags_of_numpy_are_welcome():
    numbers = {"temperature": np.float32(0.5), "entropy_weight": np.int32(1), "seed": np.int64(2)}
    head = DropMaxHead(np.int64(3), stochastic=np.bool_(False), **numbers)
    config = head.get_config()
    assert DropMaxHead.from_config(config).units == 3
    assert [type(config[name]) for name in ("units", "stochastic")] == [int, bool]
    assert config["stochastic"] is False


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning")
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)
def test_keras_own_layer_test(kwargs):
    """Keras builds, calls, trains, saves, loads and serializes the layer under several dtypes."""
    branches = {"retain_probability": 1, "posterior": 3}.get(next(iter(kwargs), ""), 2)
    TestCase().run_layer_test(
        DropMaxHead,
        init_kwargs={"units": 4, "seed": 1, **kwargs},
        input_shape=(3, 5),
        expected_output_shape=(3, 4),
        expected_num_trainable_weights=2 * branches,
        expected_num_non_trainable_weights=1,
        expected_num_seed_generators=2,
        expected_num_losses=None,  # Keras would count those of inference.
        supports_masking=True,
    )


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("size", [10.0, 1e4])
def test_mixed_precision_is_finite(rng, policy, size):
    """The matrix products, and nothing else, are in half precision."""
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
    assert head.branches["classes"].kernel.dtype == "float32"
    assert all(np.isfinite(t).all() for t in [scores, loss, *gradients])
    log_p = {}
    for head.predict_mode in MODES:
        log_p[head.predict_mode] = head(features)
        np.testing.assert_allclose(np.exp(log_p[head.predict_mode]).sum(-1), 1, atol=1e-5)
    assert {scores.dtype, *(found.dtype for found in log_p.values())} == {tf.float32}
    if size == 10:
        reference = functional.expected_log_probabilities(logits, retain_logits)
        tolerance = 0.3 if policy == "mixed_bfloat16" else 0.03
        np.testing.assert_allclose(log_p["expected"], reference, atol=tolerance)


@pytest.mark.parametrize("floatx", ["float16", "bfloat16", "float64"])
def test_every_floatx_trains(blobs, floatx):
    keras.config.set_floatx(floatx)
    model = keras.Sequential([keras.Input((6,)), DropMaxHead(4, seed=1, dtype=floatx)])
    model.compile(keras.optimizers.SGD(0.5), DropMaxLoss(), metrics=["accuracy"])
    model.fit(*blobs, epochs=5, verbose=0)
    loss, accuracy = (float(value) for value in model.evaluate(*blobs, verbose=0))
    assert loss < 1
    assert accuracy > 0.9


@pytest.mark.parametrize("activation", [None, "softmax"])
def test_from_dense_starts_where_the_classifier_was(rng, activation):
    features = rng.normal(size=(20, 4)).astype("float32")
    options = {"bias_initializer": "ones", "kernel_regularizer": "l2"}
    dense = keras.layers.Dense(3, activation=activation, **options)
    expected = dense(features).numpy()
    if activation is None:
        expected = tf.nn.softmax(expected).numpy()
    head = DropMaxHead.from_dense(dense, seed=1, entropy_weight=0.1, posterior="label")
    np.testing.assert_allclose(np.exp(head(features)), expected, atol=1e-6)
    np.testing.assert_allclose(head.retain_probabilities(features), 0.5)
    assert head.entropy_weight == 0.1
    assert isinstance(head.branches["classes"].kernel_regularizer, keras.regularizers.L2)
    assert head.branches["retain"].kernel_regularizer is None
    before = dense.kernel.numpy()
    head.branches["classes"].kernel.assign(2 * before)
    np.testing.assert_array_equal(dense.kernel, before)
    bare = keras.layers.Dense(3, use_bias=False)
    bare.build((None, 4))
    assert len(DropMaxHead.from_dense(bare, retain_probability=0.4).trainable_weights) == 1
    dense.enable_lora(2)
    dense.set_weights([weight + 0.1 for weight in dense.get_weights()])
    head = DropMaxHead.from_dense(dense)
    probabilities = np.exp(head(features))
    expected = dense(features) if activation else tf.nn.softmax(dense(features))
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)


def test_from_dense_refuses_what_it_cannot_start_from():
    with pytest.raises(TypeError, match="Dense"):
        DropMaxHead.from_dense(keras.layers.Conv1D(3, 1))
    quantized, relu = keras.layers.Dense(3), keras.layers.Dense(3, activation="relu")
    quantized.build((None, 4))
    quantized.quantize("int8")
    relu.build((None, 4))
    for dense, message in [
        (keras.layers.Dense(3), "built=False"),
        (relu, "activation='relu'"),
        (quantized, "quantization_mode='int8'"),
    ]:
        with pytest.raises(ValueError, match=message):
            DropMaxHead.from_dense(dense)
    good = keras.layers.Dense(3)
    good.build((None, 4))
    with pytest.raises(ValueError, match="'classes'"):
        DropMaxHead.from_dense(good, use_bias=False)


def test_modes_of_the_head_are_those_of_functional(golden):
    branches = [golden[name].astype("float32") for name in ("logits", "retain_logits")]
    features, head = np.concatenate(branches, axis=1), selecting_head(branches[0].shape[1])
    for mode in DETERMINISTIC:
        head.predict_mode = mode
        np.testing.assert_allclose(np.exp(head(features)), golden[mode], atol=1e-5)
    head.predict_mode, head.predict_samples = "sampled", 1000
    call = tf.function(head)
    sampled, other = (np.exp(call(features)) for _ in range(2))
    np.testing.assert_allclose(sampled, golden["exact"], atol=0.08)
    assert np.abs(sampled - other).max() > 1e-5  # The second call draws the next masks.


def test_label_predicts_by_the_prior_alone(rng):
    head = DropMaxHead(3, posterior="label", seed=1, retain=GLOROT)
    features = rng.normal(size=(5, 4)).astype("float32")
    before = head(features).numpy()
    retain, auxiliary = head.branches["retain"].kernel, head.branches["auxiliary"].kernel
    auxiliary.assign(rng.normal(size=(4, 3)))
    logits = head.mask_distribution(features).logits_parameter()
    np.testing.assert_allclose(logits, features @ (retain + auxiliary).numpy(), atol=1e-5)
    np.testing.assert_array_equal(head(features), before)


def test_retain_probabilities_and_mask_distribution(rng):
    features = rng.normal(size=(6, 3)).astype("float32")
    head = DropMaxHead(4, temperature=0.5, retain={**GLOROT, "bias_initializer": "ones"})
    distribution = head.mask_distribution(features)
    rho = oracles.sigmoid(features @ head.branches["retain"].kernel.numpy() + 1)
    np.testing.assert_allclose(head.retain_probabilities(features), rho, atol=1e-6)
    np.testing.assert_allclose(tf.sigmoid(distribution.logits_parameter()), rho, atol=1e-6)
    assert distribution.temperature.numpy() == 0.5
    assert distribution.batch_shape == (6, 4)
    for head in [DropMaxHead(4, retain_probability=0.5), DropMaxHead(4, stochastic=False)]:
        with pytest.raises(ValueError, match="relaxed masks"):
            head.mask_distribution(features)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_outputs_of_a_second_call(rng, dtype):
    """In float32 under every policy. They add no loss, and draw no masks."""
    features = rng.normal(size=(5, 3, 6)).astype("float32")
    head = DropMaxHead(4, seed=1, retain=GLOROT, dtype=dtype)
    head.build(features.shape)
    logits, retain_logits = (
        features @ head.branches[name].kernel.numpy() for name in ("classes", "retain")
    )
    expected = {
        "classes": functional.expected_log_probabilities(logits, retain_logits),
        "logits": logits,
        "retain_logits": retain_logits,
        "retain_probabilities": oracles.sigmoid(retain_logits),
    }
    inputs = keras.Input((3, 6))
    for output, values in expected.items():
        symbolic = head(inputs, output=output)
        assert (symbolic.shape, symbolic.dtype) == ((None, 3, 4), "float32")
        of_calls = [head(features, output=output), keras.Model(inputs, symbolic)(features)]
        if output != "classes":
            of_calls.append(head(features, training=True, output=output))
        for found in of_calls:
            np.testing.assert_allclose(found, values, atol=1e-6 if dtype == "float32" else 0.1)
            np.testing.assert_array_equal(found, of_calls[0])
    assert head.losses == []
    for x in (inputs, features):
        with pytest.raises(ValueError, match="`output` must be one of"):
            head(x, output="masks")


def test_methods_take_sparse_features(rng):
    """The integration tests train, evaluate and calibrate with them."""
    features = np.where(rng.random((6, 3)) < 0.5, rng.normal(size=(6, 3)), 0).astype("float32")
    head, sparse = DropMaxHead(4, seed=1, retain=GLOROT), tf.sparse.from_dense(features)
    rho = head.retain_probabilities(features)
    np.testing.assert_allclose(head.retain_probabilities(sparse), rho, atol=1e-6)
    assert head.uncertainty(sparse).entropy.shape == (6,)
    assert head.mask_distribution(sparse).batch_shape == (6, 4)


def test_no_log_probability_is_zero():
    """Metrics of Keras skip entries that are 0."""
    for dtype, largest in [("float32", -(2.0**-24)), ("float64", np.log1p(-(2.0**-29)))]:
        for mode in MODES:
            head = selecting_head(3, dtype=dtype, predict_mode=mode)
            sure = tf.constant([[90.0, -90.0, -90.0, 50.0, 50.0, 50.0]], dtype)
            assert head(sure).numpy().max() == pytest.approx(largest, rel=1e-6)
