"""The systems of the comparison: each trains, and its parts do what they are named after."""

import itertools

import numpy as np
import oracles
import pytest
import tensorflow as tf

from tf_dropmax import DropMaxHead
from tf_dropmax.experiments import data, train
from tf_dropmax.experiments.ablation import AblatedHead
from tf_dropmax.experiments.systems import ABLATIONS, PEERS, SYSTEMS


@pytest.mark.parametrize("method", {**SYSTEMS, **PEERS})
def test_every_system_trains_and_is_measured(method):
    system = {**SYSTEMS, **PEERS}[method]
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
    adaptive = {name: each for name, each in ABLATIONS.items() if "label" not in name}
    for name, system in adaptive.items():
        settings = system.options[0]
        head, _ = system.build(4, 1, 0.0, **settings)
        mode = "softmax" if name == "softmax-entropy" else "expected"
        assert head.get_config()["predict_mode"] == mode
        scores[name] = head(features, training=True).numpy()
        logits = features @ head.kernel.numpy()
        retain_logits = features @ head.retain_kernel.numpy()
        expected = -settings["entropy_weight"] * entropy(retain_logits).sum(-1).mean()
        assert float(head.losses[0]) == pytest.approx(expected, rel=1e-4)
    assert len(scores) == 9
    plain = DropMaxHead(4, seed=1)(features, training=True).numpy()
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
        head = AblatedHead(4, masks=masks, kl=kl, posterior="label", seed=1)
        head.build((None, 3))
        head.auxiliary_kernel.assign(auxiliary)
        with tf.GradientTape() as tape:
            scores[masks, kl] = head(features, training=True)
            total = tf.reduce_sum(scores[masks, kl][:, 1])
        gradients[masks, kl] = tape.gradient(total, [head.retain_kernel, head.auxiliary_kernel])
    plain = DropMaxHead(4, posterior="label", seed=1)
    plain.build((None, 3))
    plain.auxiliary_kernel.assign(auxiliary)
    np.testing.assert_array_equal(scores[True, True], plain(features, training=True))
    assert np.abs(scores[True, True] - scores[False, True]).max() > 0.01

    def divergences(retain_kernel, auxiliary_kernel):
        rho = tf.sigmoid(features @ retain_kernel)
        q = tf.sigmoid(features @ retain_kernel + features @ auxiliary_kernel)
        each = q * tf.math.log(q / rho) + (1 - q) * tf.math.log((1 - q) / (1 - rho))
        others = tf.reduce_sum(each, axis=-1, keepdims=True) - each
        return others - tf.math.log(rho)

    weights = [tf.identity(head.retain_kernel), tf.constant(auxiliary, "float32")]
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
    for part in ("no-kl", "no-masks", "no-entropy", "no-auxiliary"):
        options = ABLATIONS[f"label-{part}"].options[0]
        head, _ = ABLATIONS[f"label-{part}"].build(4, 1, 0.0, **options)
        switched_off = {
            "no-kl": not head.kl,
            "no-masks": not head.masks,
            "no-entropy": head.entropy_weight == 0,
            "no-auxiliary": head.auxiliary_weight == 0,
        }
        assert [name for name, off in switched_off.items() if off] == [part]


def test_weights_of_sums_over_classes_scale_like_the_defaults_of_the_head():
    for classes in (2, 10, 30, 31, 242, 1000):
        options = SYSTEMS["label"].options_for(classes)
        head = DropMaxHead(classes, posterior="label")
        assert options[0]["entropy_weight"] == pytest.approx(head.entropy_weight, rel=0.05)
        assert options[0]["auxiliary_weight"] == pytest.approx(head.auxiliary_weight, rel=0.05)
        assert head.entropy_weight == min(1, 30 / classes)
        assert head.auxiliary_weight == pytest.approx(0.1 * head.entropy_weight)
    assert SYSTEMS["random"].options_for(1000) == SYSTEMS["random"].options
    assert train.COLUMNS["digits"].classes == data.digits().classes


@pytest.mark.parametrize("method", ["base", "attention", "adaptive", "label"])
def test_weight_decay_of_all_weights_except_the_retain_branch(method, rng):
    head, _ = SYSTEMS[method].build(4, 1, 0.1, **SYSTEMS[method].options[0])
    head.build((None, 3))
    head.bias.assign(rng.normal(size=4))
    expected = 0.1 / 2 * sum(float(np.sum(np.square(w))) for w in (head.kernel, head.bias))
    assert float(sum(head.losses)) == pytest.approx(expected, rel=1e-5)
