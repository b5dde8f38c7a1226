"""The head in all the kinds of model and ways of training that Keras has."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import GLOROT

from tf_dropmax import DropMaxHead, DropMaxLoss, DropMaxMonitor
from tf_dropmax.experiments import data, networks


def sequential(**kwargs):
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(16, "relu"), DropMaxHead(4, **kwargs)]
    )


def functional_model(**kwargs):
    inputs = keras.Input((6,))
    return keras.Model(inputs, DropMaxHead(4, **kwargs)(keras.layers.Dense(16, "relu")(inputs)))


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


RANDOM, ATTENTION = {"retain_probability": 0.5}, {"stochastic": False}


@pytest.mark.parametrize("build", [sequential, functional_model, Subclassed, nested])
@pytest.mark.parametrize(
    "kwargs", [{}, *(pytest.param(k, marks=pytest.mark.long) for k in (RANDOM, ATTENTION))], ids=str
)
def test_kinds_of_model_learn(blobs, build, kwargs):
    x, y = blobs
    model = build(seed=0, **kwargs)
    model.compile(
        keras.optimizers.Adam(0.02),
        DropMaxLoss(),
        metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)],
    )
    history = model.fit(x, y, epochs=12, verbose=0, validation_split=0.2).history
    assert history["loss"][-1] < history["loss"][0]
    assert error(model, x, y) < 0.1
    assert history["val_accuracy"][-1] > 0.9
    assert history["val_sparse_top_k_categorical_accuracy"][-1] >= history["val_accuracy"][-1]
    probabilities = np.exp(model.predict(x, verbose=0))
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
    # Validation reports the negative log-likelihood, without the entropy term of the training.
    loss, *_ = model.evaluate(x, y, verbose=0)
    assert loss == pytest.approx(-np.log(probabilities[np.arange(len(y)), y]).mean(), rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"run_eagerly": True},
        {"jit_compile": True},
        {"jit_compile": False},
        {"steps_per_execution": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("kwargs", [{}, RANDOM, ATTENTION], ids=str)
def test_ways_to_execute(blobs, settings, kwargs):
    x, y = blobs
    model = sequential(seed=0, **kwargs)
    model.compile(keras.optimizers.Adam(0.02), DropMaxLoss(), metrics=["accuracy"], **settings)
    model.fit(
        tf.data.Dataset.from_tensor_slices((x, y)).batch(16), epochs=8, shuffle=False, verbose=0
    )
    assert error(model, x, y) < 0.1


def train_once(x, y, loss=None, head=None, **fit):
    """The loss and the weights after one step on the whole batch. The start is always the same."""
    model = keras.Sequential([keras.Input((6,)), DropMaxHead(4, seed=3, **(head or {}))])
    model.compile(keras.optimizers.SGD(0.5), loss or DropMaxLoss())
    history = model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0, **fit)
    return history.history["loss"][0], np.concatenate([w.numpy().ravel() for w in model.weights])


def assert_same_training(one, other):
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(one[1], other[1], atol=1e-6)


def test_forms_of_labels_train_alike(blobs):
    x, y = blobs
    reference = train_once(x, y)
    for labels in [
        y[:, None],
        y.astype("uint8"),
        y.astype("float32"),
        np.eye(4)[y],
        np.eye(4, dtype="int64")[y],
    ]:
        assert_same_training(train_once(x, labels), reference)


def test_mixup_is_the_mixture_of_objectives(blobs):
    x, y = blobs
    other = np.roll(y, 1)
    mixed = train_once(x, 0.3 * np.eye(4)[y] + 0.7 * np.eye(4)[other])
    losses = 0.3 * train_once(x, y)[0] + 0.7 * train_once(x, other)[0]
    assert mixed[0] == pytest.approx(losses, rel=1e-5, abs=1e-6)


def test_sample_and_class_weights(blobs):
    x, y = blobs
    by_class = {0: 2.0, 1: 0.5, 2: 0.0, 3: 1.5}
    weights = np.array([by_class[label] for label in y])
    assert_same_training(
        train_once(x, y, class_weight=by_class), train_once(x, y, sample_weight=weights)
    )
    # The weights multiply the loss and not the entropy term.
    head = {"entropy_weight": 0.0}
    weighted, plain = (
        train_once(x, y, head=head, sample_weight=w)[0] for w in (np.full(len(y), 3.0), None)
    )
    assert weighted == pytest.approx(3 * plain, rel=1e-5)
    entropy = [
        train_once(
            x,
            y,
            head={"entropy_weight": 1.0, "entropy_warmup": 0},
            sample_weight=np.full(len(y), w),
        )[0]
        for w in (0.0, 1.0)
    ]
    assert entropy[0] < min(0, entropy[1] - 1)


def test_train_on_batch_and_gradient_tape_agree_with_fit(blobs):
    x, y = blobs
    reference = train_once(x, y)

    def build():
        model = keras.Sequential([keras.Input((6,)), DropMaxHead(4, seed=3)])
        model.compile(keras.optimizers.SGD(0.5), DropMaxLoss())
        return model

    model = build()
    loss = model.train_on_batch(x, y)
    assert_same_training(
        (loss, np.concatenate([w.numpy().ravel() for w in model.weights])), reference
    )
    model, objective = build(), DropMaxLoss()
    with tf.GradientTape() as tape:
        loss = objective(y, model(x, training=True)) + sum(model.losses)
    gradients = tape.gradient(loss, model.trainable_variables)
    model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    assert_same_training(
        (loss.numpy(), np.concatenate([w.numpy().ravel() for w in model.weights])), reference
    )


def test_keras_masks_count_in_loss_and_entropy(rng):
    """A padded sequence trains as the sequence without its padding does."""
    x = rng.normal(size=(1, 5, 3)).astype("float32")
    padded = np.concatenate([x, np.zeros((1, 4, 3), "float32")], axis=1)
    y = np.arange(9)[None] % 2

    def train(x, y):
        head = DropMaxHead(2, stochastic=False, seed=1)
        model = keras.Sequential([keras.Input((None, 3)), keras.layers.Masking(), head])
        model.compile(keras.optimizers.SGD(0.5), DropMaxLoss())
        loss = model.fit(x, y, verbose=0).history["loss"][0]
        return (loss, np.concatenate([w.numpy().ravel() for w in model.weights])), model.evaluate(
            x, y, verbose=0
        )

    (one, evaluated), (other, evaluated_padded) = train(x, y[:, :5]), train(padded, y)
    assert_same_training(one, other)
    assert evaluated == pytest.approx(evaluated_padded, rel=1e-5)


def test_images_of_labels(rng):
    """Segmentation: (B, H, W, d) features, void pixels ignored."""
    x = rng.normal(size=(8, 4, 5, 3)).astype("float32")
    y = (x[..., 0] > 0).astype(int)
    y[:, 0, 0] = 255
    model = keras.Sequential([keras.Input((4, 5, 3)), DropMaxHead(2, seed=0)])
    model.compile(keras.optimizers.Adam(0.1), DropMaxLoss(ignore_class=255))
    model.fit(x, y, epochs=30, verbose=0)
    wrong = model.predict(x, verbose=0).argmax(-1) != y
    assert np.mean(wrong[y != 255]) < 0.1


def test_two_heads_and_a_shared_head(blobs):
    x, y = blobs
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(16, "relu")(inputs)
    fine, coarse = (
        DropMaxHead(4, seed=1, name="fine")(hidden),
        DropMaxHead(2, seed=2, name="coarse")(hidden),
    )
    model = keras.Model(inputs, {"fine": fine, "coarse": coarse})
    model.compile(
        keras.optimizers.Adam(0.02),
        {"fine": DropMaxLoss(), "coarse": DropMaxLoss()},
        metrics={"fine": "accuracy", "coarse": "accuracy"},
        loss_weights={"fine": 1.0, "coarse": 0.5},
    )
    model.fit(x, {"fine": y, "coarse": y % 2}, epochs=12, verbose=0)
    assert len(model.losses) == 2
    result = model.evaluate(x, {"fine": y, "coarse": y % 2}, verbose=0, return_dict=True)
    assert min(result["fine_accuracy"], result["coarse_accuracy"]) > 0.9

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
    assert np.abs(one - other).max() > 1e-3  # either call draws masks of its own


def test_a_softmax_on_top_serves_probabilities(blobs):
    x, _ = blobs
    model = sequential()
    served = keras.Sequential([model, keras.layers.Softmax()])
    np.testing.assert_allclose(
        served.predict(x, verbose=0), np.exp(model.predict(x, verbose=0)), atol=1e-6
    )


def test_frozen_features(blobs):
    x, y = blobs
    model = sequential(seed=0)
    model.layers[0].trainable = False
    before = model.layers[0].kernel.numpy().copy()
    model.compile("adam", DropMaxLoss())
    model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), before)


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
    model.compile(optimizer, DropMaxLoss(), metrics=["accuracy"], jit_compile=jit_compile)
    before = model.get_weights()
    history = model.fit(x, y, epochs=30, batch_size=16, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert error(model, x, y) < 0.1
    assert model.predict(x, verbose=0).dtype == "float32"
    plain = sequential(seed=0)
    plain.compile("adam", DropMaxLoss(), jit_compile=jit_compile)
    plain.fit(x, y, epochs=2, verbose=0)
    assert isinstance(plain.optimizer, keras.optimizers.LossScaleOptimizer) == (
        policy == "mixed_float16"
    )
    if policy == "mixed_float16":  # The scale was far too large. Keras has lowered it.
        assert 1 < float(model.optimizer.dynamic_scale) < 2.0**40
        assert not np.allclose(before[0], model.get_weights()[0])


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


@pytest.mark.parametrize("as_list", [False, True])
def test_the_monitor_takes_labels_and_weights_by_output(blobs, as_list):
    """The names of the outputs are not those of the heads."""
    x, y = blobs
    inputs = keras.Input((6,))
    heads = [DropMaxHead(classes, seed=1, retain=GLOROT) for classes in (4, 2)]
    outputs = [head(inputs) for head in heads]
    model = keras.Model(inputs, outputs if as_list else {"a": outputs[0], "b": outputs[1]})
    loss, labels = [DropMaxLoss(), DropMaxLoss()], [y, y % 2]
    weights = [np.ones(len(y)), np.arange(len(y)) < 50]
    if not as_list:
        loss, labels, weights = ({"a": a, "b": b} for a, b in (loss, labels, weights))
    model.compile("sgd", loss)
    watched = (x, labels, weights) if not as_list else (x, tuple(labels), tuple(weights))
    monitor = DropMaxMonitor(tf.data.Dataset.from_tensor_slices(watched).batch(64))
    history = model.fit(x, labels, callbacks=[monitor], verbose=0).history
    for head, target, rows in zip(heads, (y, y % 2), (len(y), 50), strict=True):
        rho = head.retain_probabilities(x).numpy()
        expected = rho[np.arange(rows), target[:rows]].mean()
        assert history[f"{head.name}_retain_target"][0] == pytest.approx(expected, rel=1e-5)
    for missing in (None, {"other": y}):
        with pytest.raises(ValueError, match="Expected labels of a head"):
            model.fit(x, labels, callbacks=[DropMaxMonitor(x, missing)], verbose=0)
