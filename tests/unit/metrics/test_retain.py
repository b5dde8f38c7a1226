"""Metrics of retain probabilities, and all metrics in models with two outputs."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_dropmax
from tf_dropmax import DropMaxHead, DropMaxLoss
from tf_dropmax.metrics import retain_statistics

T = 5
PROBABILITY_METRICS = ["NegativeLogLikelihood", "BrierScore", "ExpectedCalibrationError"]
RETAIN_METRICS = ["TargetRetainProbability", "NonTargetRetainProbability", "RetainedClasses"]


def metric(name, /, **kwargs):
    return getattr(tf_dropmax, name)(**kwargs)


def test_retain_metrics_agree_with_a_loop(rng):
    rho, labels = rng.random((6, 3, T)).astype("float32"), rng.integers(T, size=(6, 3))
    weights, mask = rng.random(6).astype("float32"), rng.random((6, 3)) < 0.5
    rows = []
    for i, j in np.ndindex(6, 3):
        target = rho[i, j, labels[i, j]]
        others = [rho[i, j, t] for t in range(T) if t != labels[i, j]]
        rows.append([target, np.mean(others), target + sum(others)])
    rows = np.array(rows)
    np.testing.assert_allclose(np.reshape(retain_statistics(labels, rho), (3, -1)).T, rows, 1e-5)
    masked = tf.constant(rho)
    masked._keras_mask = tf.constant(mask)  # Keras passes a mask in this way.
    for index, name in enumerate(RETAIN_METRICS):
        expected = rows[:, index]
        for y in (labels, labels[..., None], np.eye(T, dtype=int)[labels]):
            assert float(metric(name)(y, rho)) == pytest.approx(expected.mean(), rel=1e-5)
        weighted = np.average(expected, weights=np.repeat(weights, 3))
        assert float(metric(name)(labels, rho, weights)) == pytest.approx(weighted, rel=1e-5)
        kept = expected[mask.ravel()].mean()
        assert float(metric(name)(labels, masked)) == pytest.approx(kept, rel=1e-5)


def test_one_class_has_no_others():
    np.testing.assert_array_equal(retain_statistics([0], [[0.5]]), [[0.5], [0.0], [0.5]])


def metrics_of_outputs():
    of_classes = [metric(name) for name in PROBABILITY_METRICS]
    return {"classes": of_classes, "retain": [metric(name) for name in RETAIN_METRICS]}


def two_outputs(jit_compile):
    inputs, head = keras.Input((6,)), DropMaxHead(4, seed=1, name="head")
    features = keras.layers.Dense(8, "relu")(inputs)
    retain = head(features, output="retain_probabilities")
    model = keras.Model(inputs, {"classes": head(features), "retain": retain})
    model.compile(
        keras.optimizers.SGD(0.1),
        loss={"classes": DropMaxLoss()},
        metrics=metrics_of_outputs(),
        weighted_metrics={"classes": [metric("BrierScore", name="weighted")]},
        jit_compile=jit_compile,
    )
    return model


def by_hand(model, x, y, weights):
    outputs = model(x)
    values = {"classes_weighted": metric("BrierScore")(y, outputs["classes"], weights)}
    for output, metrics in metrics_of_outputs().items():
        for each in metrics:
            values[f"{output}_{each.name}"] = each(y, outputs[output])
    return {name: pytest.approx(float(value), rel=1e-4) for name, value in values.items()}


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.long)])
def test_retain_probabilities_as_a_second_output(jit_compile, blobs):
    x, y = blobs
    labels = {"classes": y, "retain": y}
    weights = {"classes": np.linspace(0, 1, 160), "retain": np.ones(160)}
    model = two_outputs(jit_compile)
    fit = {"epochs": 2, "batch_size": 80 if jit_compile else 37, "verbose": 0}
    fit["validation_data"] = x, labels, weights
    history = model.fit(x, labels, sample_weight=weights, **fit).history
    validation = [name for name in history if name.startswith("val_")]
    last = {name.removeprefix("val_"): history[name][-1] for name in validation}
    del last["loss"]
    assert last == by_hand(model, x, y, weights["classes"])
    assert history["val_retain_retained_classes"][0] != last["retain_retained_classes"]


def test_a_compiled_model_with_two_outputs_saves_and_reloads(blobs, tmp_path):
    x, y = blobs
    labels = {"classes": y, "retain": y}
    model = two_outputs(jit_compile=False)
    model.fit(x, labels, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len(loaded.weights) == len(model.weights) == 7  # The head was called twice.
    one, other = (m.evaluate(x, labels, return_dict=True, verbose=0) for m in (model, loaded))
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_two_replicas_count_every_example_once(strategy, blobs):
    x, y = (part[:65] for part in blobs)  # In the last batch one replica has no row.
    labels = {"classes": y, "retain": y}
    with strategy.scope():
        model = two_outputs(jit_compile=False)
    single = two_outputs(jit_compile=False)
    single.set_weights(model.get_weights())
    one, other = (
        m.evaluate(x, labels, batch_size=32, return_dict=True, verbose=0) for m in (model, single)
    )
    assert one == pytest.approx(other, rel=1e-4)
    history = model.fit(x, labels, batch_size=32, verbose=0).history
    assert set(history) == set(one)
    assert np.isfinite(list(history.values())).all()
