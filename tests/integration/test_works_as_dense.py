"""What works with a `Dense` classifier works with the head: the table in docs/deployment.md."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf
import workers
from keras.wrappers import SKLearnClassifier
from models import GLOROT, MODES, VARIANTS, classifier, selecting_head
from sklearn.model_selection import cross_val_score

from tf_dropmax import DropMaxHead, DropMaxLoss, DropMaxMonitor, calibrate


def trained(x, y, epochs=20, **kwargs):
    model = keras.Sequential([keras.Input((6,)), DropMaxHead(4, seed=1, **kwargs)])
    model.compile(keras.optimizers.Adam(0.1), DropMaxLoss())
    model.fit(x, y, epochs=epochs, verbose=0)
    return model


def everything(data, y, inputs, features):
    """What training, evaluation, calibration and the methods of a head give."""
    head = DropMaxHead(4, seed=1, kernel_initializer=keras.initializers.HeNormal(1), retain=GLOROT)
    hidden = features(inputs)
    model = keras.Model(inputs, [head(hidden), head(hidden, output="retain_probabilities")])
    model.compile("sgd", [DropMaxLoss(), None])
    settings = {"shuffle": False, "verbose": 0, "callbacks": [DropMaxMonitor(data, y)]}
    found = dict(model.fit(data, y, **settings).history)
    found["evaluate"] = model.evaluate(data, y, verbose=0)
    found["log_p"], found["retain"] = model.predict(data, verbose=0)
    found["temperature"] = calibrate(keras.Model(inputs, model.outputs[0]), data, y)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_sparse_features(blobs):
    x, y = blobs
    x = np.where(x > 0.2, x, 0)

    def linear(inputs):
        return inputs

    expected = everything(x, y, keras.Input((6,)), linear)
    for make in (scipy.sparse.csr_matrix, tf.sparse.from_dense):
        assert_same(everything(make(x), y, keras.Input((6,), sparse=True), linear), expected)


class Mean(keras.layers.Layer):
    def call(self, sequences):
        return tf.reduce_mean(sequences, axis=1)


def test_ragged_sequences(blobs):
    """`Dense` takes no ragged tensor either: a layer before it makes a vector of each sequence."""
    x, _ = blobs
    lengths = np.tile([1, 2, 5], 20)
    ragged = tf.RaggedTensor.from_row_lengths(x, lengths)
    means = np.stack([part.mean(axis=0) for part in np.split(x, np.cumsum(lengths)[:-1])])
    y = np.arange(60) % 4
    found = everything(ragged, y, keras.Input((None, 6), ragged=True), Mean())
    assert_same(found, everything(means, y, keras.Input((6,)), lambda inputs: inputs))


def test_distillation_by_soft_labels(blobs):
    """The student learns the probabilities, not only the classes: the teacher is not sure."""
    x, y = blobs
    probabilities = np.exp(trained(x, y, epochs=3).predict(x, verbose=0))
    assert probabilities.max(-1).mean() < 0.9

    def cross_entropy(student):
        return -(probabilities * student.predict(x, verbose=0)).sum(-1).mean()

    student = trained(x, probabilities, entropy_weight=0.0)
    by_classes = trained(x, y)
    found = cross_entropy(student)
    assert student.evaluate(x, probabilities, verbose=0) == pytest.approx(found, rel=1e-5)
    least = -(probabilities * np.log(probabilities)).sum(-1).mean()
    assert found - least < 0.1 < cross_entropy(by_classes) - found


def test_wrappers_of_scikit_learn(blobs):
    """`predict` takes the largest score. `decision_function` gives the log-probabilities."""
    x, y = blobs
    names = np.array(["one", "two", "three", "four"])[y]

    def build(X, y):  # noqa: N803 (the names that the wrapper passes)
        model = keras.Sequential([keras.Input((X.shape[1],)), DropMaxHead(y.shape[1], seed=1)])
        model.compile(keras.optimizers.Adam(0.1), DropMaxLoss())
        return model

    fit = {"epochs": 30, "shuffle": False, "verbose": 0}
    wrapper = SKLearnClassifier(build, fit_kwargs=fit)
    assert cross_val_score(wrapper, x, names, cv=3, error_score="raise").min() > 0.9
    wrapper.fit(x, names)
    assert np.mean(wrapper.predict(x) == names) > 0.9
    log_p = wrapper.decision_function(x)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(wrapper.classes_[log_p.argmax(-1)], wrapper.predict(x))


@pytest.fixture(scope="module")
def expected_predictions():
    return {posterior: workers.predictions(posterior) for posterior in ("prior", "label")}


@pytest.mark.parametrize(("program", "runs"), [("threads", 2), ("switches", 1)])
def test_settings_of_a_process(expected_predictions, program, runs, tmp_path):
    """In a new process, where nothing has been traced."""
    command = [sys.executable, workers.__file__, program, str(tmp_path)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    for posterior, expected in expected_predictions.items():
        np.testing.assert_allclose(found[posterior], [expected] * runs, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_a_sure_prediction(mode):
    """`log_softmax` has one of about exp(-20), so that adversarial examples can be found."""
    head = selecting_head(3, predict_mode=mode)
    features = tf.constant([[20.0, 0.0, 0.5, 60.0, 60.0, 60.0]])  # It keeps every class.
    with tf.GradientTape() as tape:
        tape.watch(features)
        value = head(features)[:, 0]
    gradient = tape.gradient(value, features)[0, 1:3]
    np.testing.assert_allclose(gradient, -np.exp([-20, -19.5]), rtol=1e-3)


def test_integrated_gradients_of_drawn_masks():
    """They add up to the difference of the expectation, the retain probabilities included."""
    head = selecting_head(3, predict_mode="sampled", predict_samples=2000, seed=1)
    end = tf.constant([[1.0, 0.0, -1.0, 2.0, -1.0, 0.5]])
    path = np.linspace(0, 1, 41, dtype="float32")[:, None] * end
    with tf.GradientTape() as tape:
        tape.watch(path := tf.constant(path))
        value = tf.function(head)(path)[:, 0]
    gradients = tape.gradient(value, path).numpy()
    weights = np.full(41, 1 / 40)
    weights[[0, -1]] /= 2  # the trapezoid rule
    attribution = (weights[:, None] * gradients).sum(0) * end.numpy()[0]
    head.predict_mode = "exact"
    first, *_, last = head(path).numpy()[:, 0]
    assert attribution.sum() == pytest.approx(last - first, abs=0.05)
    assert attribution[3:].sum() > 0.3


@pytest.mark.parametrize("name", ["prior", "attention", "random"])
def test_meta_learning(rng, name):
    """The gradient of a loss after a step of gradient descent, as in MAML, on the same masks.

    That of the label posterior is tested with `functional`: it has gradients that are stopped, so
    differences are no reference.
    """
    x, y = rng.normal(size=(8, 5)), rng.integers(3, size=8)
    keras.config.set_floatx("float64")  # For differences, the entropy term needs its digits.
    start = {"kernel_initializer": keras.initializers.RandomNormal(seed=2)}
    head = DropMaxHead(3, seed=1, dtype="float64", **start, retain=start, **VARIANTS[name])
    head.build((None, 5))
    state = [variable.value for variable in head.non_trainable_variables]

    def loss(weights):
        scores, _, losses = head.stateless_call(
            weights, state, x, training=True, return_losses=True
        )
        return DropMaxLoss()(y, scores) + sum(losses)

    def after_a_step(weights):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            value = loss(weights)
        gradients = tape.gradient(value, weights)
        return loss([w - 0.5 * g for w, g in zip(weights, gradients, strict=True)])

    weights = [tf.constant(variable.numpy()) for variable in head.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(weights)
        value = after_a_step(weights)
    gradients = tape.gradient(value, weights)
    direction = [tf.constant(rng.normal(size=w.shape)) for w in weights]
    ends = [
        after_a_step([w + h * d for w, d in zip(weights, direction, strict=True)])
        for h in (1e-5, -1e-5)
    ]
    expected = (ends[0] - ends[1]) / 2e-5
    found = sum(tf.reduce_sum(g * d) for g, d in zip(gradients, direction, strict=True))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_of_predictions(rng, mode):
    """Jacobians, second derivatives, forward mode and one prediction for each row."""
    model = classifier(predict_mode=mode, predict_samples=3)
    x, *directions = tf.constant(rng.normal(size=(3, 3, 6)).astype("float32"))
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(x)
        with tf.GradientTape(persistent=True) as inner:
            inner.watch(x)
            log_p = model(x)
            first = log_p[:, 0]
        gradient = inner.gradient(first, x)
        ends = [tf.reduce_sum(gradient * direction) for direction in directions]
    jacobian = inner.batch_jacobian(log_p, x)

    np.testing.assert_allclose(jacobian[:, 0], gradient, atol=1e-5)
    one, other = (
        tf.reduce_sum(outer.gradient(end, x) * direction)  # H is symmetric.
        for end, direction in zip(ends, reversed(directions), strict=True)
    )
    assert np.abs(one) > 1e-3
    if mode == "sampled":
        return  # Every call draws other masks.
    np.testing.assert_allclose(one, other, atol=1e-4)
    with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
        log_p = model(x)
    np.testing.assert_allclose(accumulator.jvp(log_p), tf.reduce_sum(jacobian, -1), atol=1e-5)
    by_row = tf.vectorized_map(lambda row: model(row[tf.newaxis])[0], x)
    np.testing.assert_allclose(by_row, log_p, atol=1e-5)
