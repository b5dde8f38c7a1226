import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import brier_score_loss, log_loss

import tf_dropmax
from tf_dropmax import DropMaxHead, DropMaxLoss, DropMaxMonitor
from tf_dropmax.experiments.measures import calibration_error

T = 5
NAMES = ["NegativeLogLikelihood", "BrierScore", "ExpectedCalibrationError"]
RETAIN_NAMES = ["TargetRetainProbability", "NonTargetRetainProbability", "RetainedClasses"]


def metric(name, /, **kwargs):
    return getattr(tf_dropmax, name)(**kwargs)


def calibrated(count, rng, sharpness=4.0):
    """Logits, and labels that are drawn from the softmax of them, made a little too certain."""
    logits = rng.normal(size=(count, T)) * sharpness * rng.random((count, 1))
    p = softmax(0.7 * logits)
    labels = np.array([rng.choice(T, p=row) for row in p])
    return logits.astype("float32"), labels


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def equal_width(p, labels, weights, bins):
    """Bin after bin, example after example."""
    total = 0.0
    for b in range(bins):
        gap = 0.0
        for row, label, weight in zip(p, labels, weights, strict=True):
            inside = b / bins <= row.max() < (b + 1) / bins or (b == bins - 1 and row.max() >= 1)
            gap += weight * (row.max() - (row.argmax() == label)) if inside else 0
        total += abs(gap)
    return total / np.sum(weights)


def equal_mass(p, labels, weights, bins):
    """Sorted examples, the one in which a bin ends divided between two bins; and the bound that the documentation states."""
    order = np.argsort(p.max(-1), kind="stable")
    p, labels, weights = p[order].astype("float64"), labels[order], weights[order]
    confidence = p.max(-1)
    gaps, ends = weights * (confidence - (p.argmax(-1) == labels)), np.append(0, np.cumsum(weights))
    edges = np.linspace(0, ends[-1], bins + 1)
    with np.errstate(divide="ignore"):
        cells = np.clip(np.floor((np.log(confidence / (1 - confidence)) + 16) * 64), 0, 2047)
    bound = 0.0
    for edge in edges[1:-1]:
        at = min(np.searchsorted(ends, edge, side="right") - 1, len(p) - 1)
        bound += 0.51 * weights[cells == cells[at]].sum() / ends[-1]
    return np.sum(np.abs(np.diff(np.interp(edges, ends, np.append(0, np.cumsum(gaps)))))) / ends[-1], bound


def reference(name, p, labels, weights):
    p = p.astype("float64") / p.sum(-1, keepdims=True, dtype="float64")
    if name == "NegativeLogLikelihood":
        return log_loss(labels, p, sample_weight=weights, labels=range(T))
    if name == "BrierScore":
        return brier_score_loss(labels, p, sample_weight=weights, labels=range(T), scale_by_half=False)
    return equal_width(p, labels, weights, bins=15)


@pytest.mark.parametrize("name", NAMES)
def test_agree_with_scikit_learn_and_a_loop(name, rng):
    logits, labels = calibrated(150, rng)
    weights = rng.random(150).astype("float32")
    p = tf.nn.softmax(logits).numpy()
    forms = [labels, labels[:, None], np.eye(T, dtype=int)[labels], np.eye(T, dtype="float32")[labels]]
    predictions = [(True, logits + 3), (True, tf.nn.log_softmax(logits)), (False, p)]
    for form, (from_logits, y_pred) in [(labels, predictions[0]), *[(form, predictions[2]) for form in forms]]:
        for weight in (None, weights, weights[:, None]):
            value = float(metric(name, from_logits=from_logits)(form, y_pred, weight))
            expected = reference(name, p, labels, np.ones(150) if weight is None else weights)
            assert value == pytest.approx(expected, rel=2e-5)
    assert float(metric(name)(labels, predictions[1][1])) == pytest.approx(float(metric(name)(labels, logits)), rel=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"bins": 7}, {"binning": "mass"}], ids=str)
def test_batches_make_no_difference_to_the_calibration_error(arguments, rng):
    logits, labels = calibrated(700, rng)
    p = softmax(logits).astype("float32")
    one, many = (metric("ExpectedCalibrationError", from_logits=False, **arguments) for _ in range(2))
    one.update_state(labels, p)
    for rows in np.split(rng.permutation(700), [1, 40, 300, 300]):
        many.update_state(labels[rows], p[rows])
    np.testing.assert_array_equal(one._sums, many._sums)
    assert float(one.result()) == float(many.result()) > 0.01
    if "binning" not in arguments:
        expected = calibration_error(np.log(p.astype("float64")), labels, **arguments) / 100
        assert float(one.result()) == pytest.approx(expected, rel=1e-5)
    many.reset_state()
    assert float(many.result()) == 0.0
    assert float(many(labels, p)) == float(one.result())


@pytest.mark.parametrize("bins", [15, 4])
@pytest.mark.parametrize("sharpness", [1, 4, 40])
def test_equal_mass_bins_are_as_good_as_stated(bins, sharpness, rng):
    logits, labels = calibrated(2000, rng, sharpness)
    p = tf.nn.softmax(logits).numpy()
    for weights in (np.ones(2000, "float32"), rng.random(2000).astype("float32")):
        value = float(metric("ExpectedCalibrationError", bins=bins, binning="mass")(labels, logits, weights))
        expected, bound = equal_mass(p, labels, weights, bins)
        assert abs(value - expected) <= bound + 1e-6
        assert abs(value - expected) < 0.005  # what the bound is in practice
    assert expected > 0.01


def test_equal_mass_bins_are_exact_where_cells_do_not_matter():
    """One example a cell; and equal confidences, which a bin's end divides evenly."""
    p = np.linspace(0.51, 0.99, 10)[:, None]
    p = np.hstack([p, 1 - p])
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 0, 1, 0])
    for bins in (2, 5, 3, 1):
        expected, _ = equal_mass(p, labels, np.ones(10), bins)
        value = float(metric("ExpectedCalibrationError", bins=bins, binning="mass", from_logits=False)(labels, p))
        assert value == pytest.approx(expected, rel=1e-6)
    same = np.tile([[0.8, 0.2]], (10, 1))
    ece = metric("ExpectedCalibrationError", bins=4, binning="mass", from_logits=False)
    assert float(ece(labels, same)) == pytest.approx(0.2)  # 6 of 10 are right
    assert float(metric("ExpectedCalibrationError", binning="mass")([0, 0], [[900.0, 0.0], [0.0, 900.0]])) == 0.5


def test_retain_metrics_agree_with_a_loop(rng):
    rho, labels = rng.random((6, 3, T)).astype("float32"), rng.integers(T, size=(6, 3))
    weights, mask = rng.random(6).astype("float32"), rng.random((6, 3)) < 0.5
    rows = []
    for i, j in np.ndindex(6, 3):
        others = [rho[i, j, t] for t in range(T) if t != labels[i, j]]
        rows.append([rho[i, j, labels[i, j]], np.mean(others), sum(others) + rho[i, j, labels[i, j]]])
    rows = np.array(rows)
    masked = tf.constant(rho)
    masked._keras_mask = tf.constant(mask)  # as Keras hands a mask to a metric
    for index, name in enumerate(RETAIN_NAMES):
        for y in (labels, labels[..., None], np.eye(T, dtype=int)[labels]):
            assert float(metric(name)(y, rho)) == pytest.approx(rows[:, index].mean(), rel=1e-5)
        value = float(metric(name)(labels, rho, weights))
        assert value == pytest.approx(np.average(rows[:, index], weights=np.repeat(weights, 3)), rel=1e-5)
        assert float(metric(name)(labels, masked)) == pytest.approx(rows[mask.ravel(), index].mean(), rel=1e-5)


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_calibration_error_of_sequences_with_weights_and_a_mask(binning, rng):
    logits, labels = calibrated(40, rng)
    weights, mask = rng.random(10).astype("float32"), rng.random((10, 4)) < 0.5
    masked = tf.reshape(logits, (10, 4, T))
    masked._keras_mask = tf.constant(mask)
    sequences = metric("ExpectedCalibrationError", binning=binning)(labels.reshape(10, 4), masked, weights)
    kept = mask.ravel()
    rows = metric("ExpectedCalibrationError", binning=binning)(labels[kept], logits[kept], np.repeat(weights, 4)[kept])
    assert float(sequences) == pytest.approx(float(rows), rel=1e-6)


@pytest.mark.parametrize("name", [*NAMES[:2], *RETAIN_NAMES])
def test_soft_labels_weigh_the_classes(name, rng):
    p, soft = softmax(rng.normal(size=(1, T))), softmax(rng.normal(size=(1, T)))
    arguments = {} if name in RETAIN_NAMES else {"from_logits": False}
    expected = sum(soft[0, k] * float(metric(name, **arguments)([k], p)) for k in range(T))
    assert float(metric(name, **arguments)(soft, p)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*NAMES, *RETAIN_NAMES])
def test_what_is_wrong_is_seen(name):
    y_pred = tf.ones((2, T)) / T
    with pytest.raises(tf.errors.InvalidArgumentError, match="sparse labels must be whole numbers"):
        metric(name)([0, T], y_pred)
    with pytest.raises(ValueError, match="Labels must have the shape"):
        metric(name)(np.zeros((2, T - 1)), y_pred)
    assert np.isnan(float(metric(name)([0, 0], [[0.5, 0.5], [np.nan, 0.5]])))
    compiled = tf.function(metric(name), jit_compile=True)
    assert np.isnan(float(compiled(tf.constant([0, T]), y_pred))) or name == "RetainedClasses"
    again = metric(name, name="other").get_config()
    assert getattr(tf_dropmax, name).from_config(again).get_config() == again


def test_wrong_arguments():
    for arguments, error in [({"bins": 0}, ValueError), ({"binning": "mas"}, ValueError), ({"from_logits": 1}, TypeError)]:
        with pytest.raises(error, match=next(iter(arguments))):
            metric("ExpectedCalibrationError", **arguments)


def test_probabilities_of_zero_and_of_minus_infinity():
    logits = [[0.0, -np.inf]]
    assert float(metric("NegativeLogLikelihood")([0], logits)) == 0.0
    assert float(metric("BrierScore")([1], logits)) == 2.0
    value = float(metric("NegativeLogLikelihood", from_logits=False)([[0.0, 1.0]], [[1.0, 0.0]]))
    assert value == pytest.approx(87.34, abs=0.01)


def two_outputs(jit_compile="auto", **kwargs):
    inputs, head = keras.Input((6,)), DropMaxHead(4, seed=1, name="head", **kwargs)
    features = keras.layers.Dense(8, "relu", kernel_initializer=keras.initializers.GlorotUniform(seed=2))(inputs)
    retain = head(features, output="retain_probabilities")
    model = keras.Model(inputs, {"classes": head(features), "retain": retain})
    metrics = [metric(name) for name in NAMES] + [metric("ExpectedCalibrationError", binning="mass", name="mass")]
    retain_metrics = [metric(name) for name in RETAIN_NAMES]
    model.compile(
        keras.optimizers.SGD(0.1),
        loss={"classes": DropMaxLoss()},
        metrics={"classes": metrics, "retain": retain_metrics},
        weighted_metrics={"classes": [metric("BrierScore", name="weighted")]},
        jit_compile=jit_compile,
    )
    return model


def by_hand(model, x, y, weights):
    head = model.get_layer("head")
    features = model.layers[1](x)
    log_p, rho = head(features), head.retain_probabilities(features)
    values = {f"classes_{metric(name).name}": metric(name)(y, log_p) for name in NAMES}
    values["classes_mass"] = metric("ExpectedCalibrationError", binning="mass")(y, log_p)
    values["classes_weighted"] = metric("BrierScore")(y, log_p, weights)
    values |= {f"retain_{metric(name).name}": metric(name)(y, rho) for name in RETAIN_NAMES}
    return {name: pytest.approx(float(value), rel=1e-4) for name, value in values.items()}


@pytest.mark.parametrize("jit_compile", [False, True])
def test_retain_probabilities_as_a_second_output(jit_compile, blobs):
    x, y = blobs
    labels, weights = {"classes": y, "retain": y}, {"classes": np.linspace(0, 1, 160), "retain": np.ones(160)}
    model = two_outputs(jit_compile)
    callbacks = [] if jit_compile else [DropMaxMonitor(x, y)]
    fit = {"validation_data": (x, labels, weights), "batch_size": 80 if jit_compile else 37, "verbose": 0}
    history = model.fit(x, labels, sample_weight=weights, epochs=2, callbacks=callbacks, **fit).history
    last = {name.removeprefix("val_"): values[-1] for name, values in history.items() if name.startswith("val_")}
    del last["loss"]
    assert last == by_hand(model, x, y, weights["classes"])
    assert history["val_retain_retained_classes"][0] != last["retain_retained_classes"]
    if callbacks:
        assert history["retain_target"][-1] == pytest.approx(last["retain_target_retain_probability"], rel=1e-5)
        assert history["retained_classes"][-1] == pytest.approx(last["retain_retained_classes"], rel=1e-5)


def test_a_compiled_model_with_two_outputs_saves_and_reloads(blobs, tmp_path):
    x, y = blobs
    labels = {"classes": y, "retain": y}
    model = two_outputs(jit_compile=False)
    model.fit(x, labels, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len(loaded.weights) == len(model.weights) == 6  # one head
    one, other = (m.evaluate(x, labels, return_dict=True, verbose=0) for m in (model, loaded))
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"retain_probability": 0.3}, {"dtype": "mixed_bfloat16"}], ids=str)
def test_the_second_call_of_the_head(kwargs, rng):
    features = rng.normal(size=(5, 3, 6)).astype("float32")
    inputs, head = keras.Input((3, 6)), DropMaxHead(4, **kwargs)
    symbolic = head(inputs, output="retain_probabilities")
    assert (symbolic.shape, symbolic.dtype) == ((None, 3, 4), "float32")
    rho = head(features, training=True, output="retain_probabilities")
    assert head.losses == []
    np.testing.assert_array_equal(rho, head.retain_probabilities(features))
    np.testing.assert_array_equal(rho, head(features, output="retain_probabilities"))
    np.testing.assert_array_equal(keras.Model(inputs, symbolic)(features), rho)
    np.testing.assert_array_equal(head(features, output="classes"), head(features))
    for x in (inputs, features):
        with pytest.raises(ValueError, match="`output` must be one of"):
            head(x, output="masks")


def test_two_replicas_count_every_example_once(blobs):
    x, y = (part[:65] for part in blobs)  # the last batch has one row, and one replica has none
    labels = {"classes": y, "retain": y}
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = two_outputs(jit_compile=False)
    single = two_outputs(jit_compile=False)
    single.set_weights(model.get_weights())
    one, other = (m.evaluate(x, labels, batch_size=32, return_dict=True, verbose=0) for m in (model, single))
    assert one == pytest.approx(other, rel=1e-4)
    history = model.fit(x, labels, batch_size=32, verbose=0).history
    assert set(history) == set(one)
    assert np.isfinite(list(history.values())).all()


@pytest.mark.parametrize(
    "metric",
    [
        tf_dropmax.NegativeLogLikelihood(from_logits=False),
        tf_dropmax.BrierScore(from_logits=False),
        tf_dropmax.ExpectedCalibrationError(from_logits=False),
        tf_dropmax.TargetRetainProbability(),
        tf_dropmax.NonTargetRetainProbability(),
        tf_dropmax.RetainedClasses(),
    ],
    ids=lambda metric: metric.name,
)
def test_what_is_no_probability_is_refused(metric):
    for wrong in ([[-0.7, -0.7]], [[1.5, 0.5]]):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"Expected `y_pred` in \[0, 1\]"):
            metric([0], tf.constant(wrong))
