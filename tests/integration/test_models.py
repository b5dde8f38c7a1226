"""The head in all the kinds of model and ways of training that Keras has."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import GLOROT, PAPER_START, VARIANTS, mean_nll

from tf_dropmax import DropMaxHead, DropMaxLoss, DropMaxMonitor
from tf_dropmax.experiments import data, networks


def sequential(**kwargs):
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(16, "relu"), DropMaxHead(4, **kwargs)]
    )


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__()
        self.features = keras.layers.Dense(16, "relu")
        self.head = DropMaxHead(4, **kwargs)

    def call(self, inputs):
        return self.head(self.features(inputs))


def nested(**kwargs):
    inputs = keras.Input((6,))
    return keras.Model(inputs, sequential(**kwargs)(inputs))


def error(model, x, y):
    return np.mean(model.predict(x, verbose=0).argmax(-1) != y)


@pytest.mark.parametrize("build", [sequential, Subclassed, nested])
def test_kinds_of_model_learn(blobs, build):
    x, y = blobs
    model = build(seed=0)
    model.compile(keras.optimizers.Adam(0.02), DropMaxLoss(), metrics=["accuracy"])
    history = model.fit(x, y, epochs=12, verbose=0, validation_split=0.2).history
    assert history["val_accuracy"][-1] > 0.9
    # Validation reports the negative log-likelihood, without the entropy term of the training.
    loss, accuracy = model.evaluate(x, y, verbose=0)
    assert accuracy > 0.9
    assert loss == pytest.approx(mean_nll(model.predict(x, verbose=0), y), rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 3}],
    ids=str,
)
@pytest.mark.parametrize("variant", ["prior", "attention", "random"])
def test_ways_to_execute(blobs, settings, variant):
    x, y = blobs
    model = sequential(seed=0, **VARIANTS[variant])
    model.compile(keras.optimizers.Adam(0.05), DropMaxLoss(), **settings)
    model.fit(x, y, batch_size=16, epochs=4, verbose=0)
    assert error(model, x, y) < 0.1


def one_layer(**kwargs):
    """The start is always the same, and so are the masks."""
    model = keras.Sequential([keras.Input((6,)), DropMaxHead(4, seed=3, **kwargs)])
    model.compile(keras.optimizers.SGD(0.5), DropMaxLoss())
    return model


def test_weights_multiply_the_loss_and_not_the_entropy_term(blobs):
    x, y = blobs
    settings = [
        {"sample_weight": np.zeros(len(y))},
        {},
        {"sample_weight": np.full(len(y), 3.0)},
        {"class_weight": dict.fromkeys(range(4), 3.0)},
    ]
    entropy_term, once, *thrice = (
        one_layer(warmup_steps=0).train_on_batch(x, y, **each) for each in settings
    )
    assert entropy_term == pytest.approx(-4 * np.log(2), rel=1e-5)
    expected = entropy_term + 3 * (once - entropy_term)
    np.testing.assert_allclose(thrice, [expected] * 2, rtol=1e-5)


def test_train_on_batch_and_gradient_tape_agree_with_fit(blobs):
    x, y = blobs
    by_fit, by_batch, by_tape = (one_layer() for _ in range(3))
    losses = by_fit.fit(x, y, batch_size=len(x), shuffle=False, verbose=0).history["loss"]
    losses.append(by_batch.train_on_batch(x, y))
    with tf.GradientTape() as tape:
        loss = DropMaxLoss()(y, by_tape(x, training=True)) + sum(by_tape.losses)
    losses.append(loss)
    gradients = tape.gradient(loss, by_tape.trainable_variables)
    by_tape.optimizer.apply(gradients, by_tape.trainable_variables)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    for model in (by_batch, by_tape):
        for found, expected in zip(model.get_weights(), by_fit.get_weights(), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_keras_masks_count_in_loss_and_entropy(rng):
    """A padded sequence trains as the sequence without its padding does."""
    x = rng.normal(size=(1, 5, 3)).astype("float32")
    padded = np.concatenate([x, np.zeros((1, 4, 3), "float32")], axis=1)
    y = np.arange(9)[np.newaxis] % 2
    results = []
    for features, labels in [(x, y[:, :5]), (padded, y)]:
        head = DropMaxHead(2, stochastic=False, seed=1, **PAPER_START)
        model = keras.Sequential([keras.Input((None, 3)), keras.layers.Masking(), head])
        model.compile(keras.optimizers.SGD(0.5), DropMaxLoss())
        losses = [model.train_on_batch(features, labels), model.test_on_batch(features, labels)]
        results.append([*losses, *model.get_weights()])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_shared_head(blobs):
    x, y = blobs
    shared = DropMaxHead(4, seed=1)
    inputs = [keras.Input((6,)), keras.Input((6,))]
    model = keras.Model(inputs, [shared(inputs[0]), shared(inputs[1])])
    model.compile(keras.optimizers.Adam(0.05), [DropMaxLoss(), DropMaxLoss()])
    model.fit([x, x[::-1]], [y, y[::-1]], epochs=12, verbose=0)
    assert len(model.losses) == 2
    one, other = model.predict([x, x], verbose=0)
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert np.mean(one.argmax(-1) != y) < 0.1
    one, other = model([x, x], training=True)
    assert np.abs(one - other).max() > 1e-3  # Each call draws masks of its own.


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_learns(blobs, policy, jit_compile):
    x, y = blobs
    keras.mixed_precision.set_dtype_policy(policy)
    model = sequential(seed=0)
    optimizer = keras.optimizers.Adam(0.02)
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=2.0**40, dynamic_growth_steps=20
        )
    model.compile(optimizer, DropMaxLoss(), jit_compile=jit_compile)
    history = model.fit(x, y, epochs=10, batch_size=16, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert error(model, x, y) < 0.1
    assert model.predict(x, verbose=0).dtype == "float32"
    if policy == "mixed_float16":  # The scale was far too large. Keras has lowered it.
        assert 1 < float(model.optimizer.dynamic_scale) < 2.0**40


@pytest.mark.long
def test_mixed_precision_is_as_accurate_on_digits():
    """Only the policy differs. The runs share their test images, about 800."""
    split = data.split(data.digits(), 100)
    errors = {}
    for policy in ["float32", "mixed_float16", "mixed_bfloat16"]:
        keras.mixed_precision.set_dtype_policy(policy)
        model = keras.Sequential([networks.mlp((8, 8, 1), seed=1), DropMaxHead(10, seed=1)])
        model.compile("adam", DropMaxLoss())
        history = model.fit(*split.train, epochs=40, batch_size=50, verbose=0).history
        assert np.isfinite(history["loss"]).all()
        errors[policy] = 100 * error(model, *split.test)
    assert errors["float32"] < 5
    assert errors["mixed_float16"] == pytest.approx(errors["float32"], abs=1)
    assert errors["mixed_bfloat16"] == pytest.approx(errors["float32"], abs=1)


def test_a_loss_of_keras_is_refused_in_eager_training_too(blobs):
    model = sequential()
    model.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
    with pytest.raises(ValueError, match="DropMaxLoss"):
        model.fit(*blobs, verbose=0)


@pytest.mark.parametrize("form", [tuple, dict])
def test_the_monitor_takes_labels_and_weights_by_output(blobs, form):
    """The names of the outputs are not those of the heads."""
    x, y = blobs
    inputs = keras.Input((6,))
    heads = [DropMaxHead(classes, seed=1, retain=GLOROT) for classes in (4, 2)]

    def by_output(*values):
        return values if form is tuple else dict(zip("ab", values, strict=True))

    model = keras.Model(inputs, by_output(*(head(inputs) for head in heads)))
    model.compile("sgd", by_output(DropMaxLoss(), DropMaxLoss()))
    labels = by_output(y, y % 2)
    weights = by_output(np.ones(len(y)), np.arange(len(y)) < 50)
    watched = tf.data.Dataset.from_tensor_slices((x, labels, weights)).batch(64)
    history = model.fit(x, labels, callbacks=[DropMaxMonitor(watched)], verbose=0).history
    for head, target, rows in zip(heads, (y, y % 2), (len(y), 50), strict=True):
        rho = head.retain_probabilities(x).numpy()
        expected = rho[np.arange(rows), target[:rows]].mean()
        assert history[f"{head.name}_retain_target"][0] == pytest.approx(expected, rel=1e-5)
    for missing in (None, {"other": y}):
        with pytest.raises(ValueError, match="Expected labels of a head"):
            model.fit(x, labels, callbacks=[DropMaxMonitor(x, missing)], verbose=0)
