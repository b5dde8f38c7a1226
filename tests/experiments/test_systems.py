"""The systems of the comparison: each trains, and its parts do what they are named after."""

import itertools

import keras
import numpy as np
import oracles
import pytest
import tensorflow as tf
from models import PAPER_START

from tf_dropmax import DropMaxHead
from tf_dropmax.experiments import data, peers, systems, train
from tf_dropmax.experiments.ablation import AblatedHead
from tf_dropmax.experiments.systems import ABLATIONS, ALL, PEERS, SYSTEMS, UNTUNED


@pytest.mark.parametrize("method", {**SYSTEMS, **PEERS, **UNTUNED})
def test_every_system_trains_and_is_measured(method):
    system = ALL[method]
    job = {"column": "digits", "protocol": "small", "iterations": 120, "seed": 0, "phase": "final"}
    settings = {"l2": 1e-3, **system.options[-1]}
    result = train.execute({**job, "method": method, "settings": settings})
    assert set(result["measures"]) == set(system.rows)
    assert result["loss"][-1] < result["loss"][0]
    for measures in result["measures"].values():
        assert measures["error %"] < 85  # chance: 90
        assert np.isfinite(list(measures.values())).all()


def test_ablated_heads(rng):
    """The contribution of each part, on one batch with the same masks."""

    def entropy(retain_logits):
        rho = oracles.sigmoid(retain_logits)
        return -rho * np.log(rho) - (1 - rho) * np.log(1 - rho)

    features = rng.normal(size=(6, 3)).astype("float32")
    scores = {}
    prior = {name: each for name, each in ABLATIONS.items() if "label" not in name}
    for name, system in prior.items():
        settings = system.options[0]
        head, _ = system.build(4, 1, 0.0, paper_start=True, **settings)
        mode = "softmax" if name == "softmax-entropy" else "expected"
        assert head.get_config()["predict_mode"] == mode
        scores[name] = head(features, training=True).numpy()
        logits, retain_logits = (features @ b.kernel.numpy() for b in head.branches.values())
        expected = -settings["entropy_weight"] * entropy(retain_logits).sum(-1).mean()
        assert float(head.losses[0]) == pytest.approx(expected, rel=1e-4)
    assert len(scores) == 9
    plain = DropMaxHead(4, seed=1, **PAPER_START)(features, training=True).numpy()
    np.testing.assert_array_equal(scores["masks+kl+entropy"], plain)
    rho = oracles.sigmoid(retain_logits)
    np.testing.assert_allclose(scores["masks+kl"] - scores["masks"], np.log(rho), atol=1e-5)
    weighted = scores["kl"] - scores["kl+entropy"]
    np.testing.assert_allclose(weighted, entropy(retain_logits), atol=1e-5)
    w = np.exp(logits)
    for k in range(4):
        others = np.arange(4) != k
        expected = np.log(w[:, k] / (w[:, k] + (rho * w)[:, others].sum(-1)))
        np.testing.assert_allclose(scores["nothing"][:, k], expected, atol=1e-5)
    softmax = np.log(w / w.sum(-1, keepdims=True))
    np.testing.assert_allclose(scores["softmax-entropy"], softmax, atol=1e-5)


def test_ablated_label_posterior(rng):
    """The whole objective is that of the head, and the KL divergences are those of its formula."""
    features = rng.normal(size=(6, 3)).astype("float32")
    auxiliary = rng.normal(size=(3, 4))
    scores, gradients = {}, {}
    for masks, kl in itertools.product((False, True), repeat=2):
        head = AblatedHead(4, masks=masks, kl=kl, posterior="label", seed=1, **PAPER_START)
        head.build((None, 3))
        head.branches["auxiliary"].kernel.assign(auxiliary)
        with tf.GradientTape() as tape:
            scores[masks, kl] = head(features, training=True)
            total = tf.reduce_sum(scores[masks, kl][:, 1])
        kernels = [head.branches[name].kernel for name in ("retain", "auxiliary")]
        gradients[masks, kl] = tape.gradient(total, kernels)
    plain = DropMaxHead(4, posterior="label", seed=1, **PAPER_START)
    plain.build((None, 3))
    plain.branches["auxiliary"].kernel.assign(auxiliary)
    np.testing.assert_array_equal(scores[True, True], plain(features, training=True))
    assert np.abs(scores[True, True] - scores[False, True]).max() > 0.01

    def divergences(retain_kernel, auxiliary_kernel):
        prior, shift = features @ retain_kernel, features @ auxiliary_kernel
        rho, q = tf.sigmoid(prior), tf.sigmoid(tf.stop_gradient(prior) + shift)
        each = q * tf.math.log(q / rho) + (1 - q) * tf.math.log((1 - q) / (1 - rho))
        others = tf.reduce_sum(each, axis=-1, keepdims=True) - each
        return others - tf.math.log(rho)

    weights = [tf.identity(kernels[0]), tf.constant(auxiliary, "float32")]
    with tf.GradientTape() as tape:
        tape.watch(weights)
        expected = divergences(*weights)
        total = tf.reduce_sum(expected[:, 1])
    for masks in (False, True):
        found = scores[masks, False] - scores[masks, True]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    by_weights = zip(gradients[False, False], gradients[False, True], strict=True)
    for (without, whole), exact in zip(by_weights, tape.gradient(total, weights), strict=True):
        np.testing.assert_allclose(without - whole, exact, atol=1e-5)
    parts = ("kl", "masks", "entropy_weight", "auxiliary_weight")
    for part in parts:
        ablation = ABLATIONS[f"label-no-{part.removesuffix('_weight')}"]
        head, _ = ablation.build(4, 1, 0.0, **ablation.options[0])
        assert [name for name in parts if not getattr(head, name)] == [part]


def test_weights_of_sums_over_classes_scale_like_the_defaults_of_the_head():
    for classes in (2, 10, 30, 31, 242, 1000):
        options = ALL["label"].options_for(classes)
        head = DropMaxHead(classes, posterior="label")
        assert options[0]["entropy_weight"] == pytest.approx(head.entropy_weight, rel=0.05)
        assert options[0]["auxiliary_weight"] == pytest.approx(head.auxiliary_weight, rel=0.05)
        assert head.entropy_weight == min(1, 30 / classes)
        assert head.auxiliary_weight == pytest.approx(0.1 * head.entropy_weight)
    assert SYSTEMS["random"].options_for(1000) == SYSTEMS["random"].options
    assert train.COLUMNS["digits"].classes == data.digits().classes


@pytest.mark.parametrize("method", ["softmax", "attention", "prior", "label"])
def test_weight_decay_of_all_weights_except_the_retain_branch(method, rng):
    head, _ = ALL[method].build(4, 1, 0.1, **ALL[method].options[0])
    head.build((None, 3))
    classes = head if method == "softmax" else head.branches["classes"]
    classes.bias.assign(rng.normal(size=4))
    expected = 0.1 / 2 * sum(float(np.sum(np.square(w))) for w in classes.weights)
    assert float(sum(head.losses)) == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def problem(rng):
    logits = rng.normal(size=(40, 5)).astype("float32") * 3
    labels = rng.integers(5, size=40)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return logits, labels, p


def test_label_smoothing(problem):
    logits, labels, p = problem
    rows = zip(p, labels, strict=True)
    expected = np.mean([-0.9 * np.log(row[y]) - 0.1 * np.log(row).mean() for row, y in rows])
    loss = peers.smoothed_cross_entropy(0.1)
    for shape in [(40,), (40, 1)]:  # Keras passes labels in both.
        found = loss(labels.reshape(shape), tf.constant(logits))
        assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 3.0])
def test_focal_loss(problem, gamma):
    logits, labels, p = problem
    rows = zip(p, labels, strict=True)
    expected = [-((1 - row[y]) ** gamma) * np.log(row[y]) for row, y in rows]
    found = peers.focal_loss(gamma)(labels, tf.constant(logits))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def _softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_mc_dropout_averages_probabilities_over_masks(rng):
    x = rng.normal(size=(7, 6)).astype("float32")
    head, _ = systems.PEERS["mc-dropout"].build(3, 1, 0.0, rate=0.5)
    initializer = keras.initializers.GlorotUniform(seed=2)
    hidden = keras.layers.Dense(2, kernel_initializer=initializer)
    model = keras.Sequential([keras.Sequential([keras.Input((6,)), hidden]), head])
    weights = [w.numpy() for w in (*model.layers[0].weights, *head.layers[1].weights)]
    features = x @ weights[0] + weights[1]
    expected = 0  # Over all four masks of two features.
    for mask in [(0, 0), (0, 2), (2, 0), (2, 2)]:
        expected += _softmax(features * np.array(mask) @ weights[2] + weights[3]) / 4
    found = np.exp(systems.PEERS["mc-dropout"].rows["S=100"](model, x))
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    means = [np.exp(systems._mean_over_dropout(count, model, x)) for count in (1, 400)]
    errors = [np.abs(mean - expected).mean() for mean in means]
    assert errors[1] < errors[0] / 5
    assert errors[1] < 0.02


def test_heteroscedastic_head(rng):
    """The mean of the softmax over other draws of the noise. Without noise it is the softmax."""
    x = rng.normal(size=(3, 4)).astype("float32")
    head = peers.HeteroscedasticHead(5, temperature=0.5, factors=2, samples=20_000, seed=1)
    found = np.exp(head(x))
    mean, factors, scale = (x @ branch.kernel.numpy() for branch in head.branches)
    for row in range(3):
        covariance = np.diag(np.log1p(np.exp(scale[row])) ** 2)
        covariance += factors[row].reshape(5, 2) @ factors[row].reshape(5, 2).T
        draws = rng.multivariate_normal(mean[row], covariance, size=20_000)
        np.testing.assert_allclose(found[row], _softmax(draws / 0.5).mean(0), atol=0.015)
    assert np.abs(found - _softmax(mean / 0.5)).max() > 0.05
    head.branches[1].kernel.assign(0 * head.branches[1].kernel)
    head.branches[2].kernel.assign(0 * head.branches[2].kernel)
    head.branches[2].bias.assign(np.full(5, -50.0))
    np.testing.assert_allclose(np.exp(head(x)), _softmax(mean / 0.5), atol=1e-5)
