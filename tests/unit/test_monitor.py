"""`DropMaxMonitor`: it logs the right numbers for every form of data."""

import contextlib
import copy

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dropmax import DropMaxHead, DropMaxLoss, DropMaxMonitor


def model_of(**kwargs):
    retain = {"kernel_initializer": keras.initializers.RandomNormal(seed=3)}
    head = DropMaxHead(4, seed=1, entropy_warmup=0, retain=retain, **kwargs)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "relu"), head])
    model.compile(keras.optimizers.Adam(0.02), DropMaxLoss())
    return model


def statistics(model, x, y):
    """One example after the other, in the words of the documentation."""
    features = model.layers[0](x).numpy()
    head = model.layers[1]
    rows = []
    for h, label in zip(features, y, strict=True):
        kernel, bias = (weight.numpy() for weight in head.branches["retain"].weights)
        r = h.astype("float64") @ kernel + bias
        rho = 1 / (1 + np.exp(-r))
        others = [rho[t] for t in range(4) if t != label]
        entropy = [-q * np.log(q) - (1 - q) * np.log(1 - q) for q in rho]
        rows.append([rho[label], np.mean(others), np.sum(rho), np.mean(entropy)])
    return dict(
        zip(
            ["retain_target", "retain_others", "retained_classes", "mask_entropy"],
            np.mean(rows, 0),
            strict=True,
        )
    )


@pytest.mark.parametrize("labels", ["(160,)", "(160, 1)", "one-hot"])
def test_statistics_are_those_of_the_definition(blobs, labels):
    x, y = blobs
    model = model_of()
    given = {"(160,)": y, "(160, 1)": y[:, None], "one-hot": np.eye(4)[y]}[labels]
    monitor = DropMaxMonitor(x, given, batch_size=37)  # the last batch is a smaller one
    after = []
    check = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: after.append(statistics(model, x, y))
    )
    history = model.fit(x, y, epochs=3, callbacks=[monitor, check], verbose=0).history
    for name in after[0]:
        np.testing.assert_allclose(history[name], [epoch[name] for epoch in after], rtol=1e-5)
        assert len(set(history[name])) == 3


def test_the_masks_of_predictions_do_not_depend_on_the_monitor(blobs):
    x, y = blobs
    drawn = []
    for callbacks in ([], [DropMaxMonitor(x, y)]):
        keras.utils.set_random_seed(0)
        model = model_of(predict_mode="sampled", predict_samples=2)
        model.fit(x, y, epochs=2, callbacks=callbacks, verbose=0, shuffle=False)
        drawn.append(model.predict(x, verbose=0))
    np.testing.assert_array_equal(*drawn)


def test_tensorboard_gets_it_too(blobs, tmp_path):
    x, y = blobs
    callbacks = [DropMaxMonitor(x, y), keras.callbacks.TensorBoard(tmp_path)]
    history = model_of().fit(x, y, callbacks=callbacks, verbose=0).history
    found = {}
    for path in (tmp_path / "train").glob("events*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            found.update(
                {value.tag: tf.make_ndarray(value.tensor) for value in event.summary.value}
            )
    for name in (
        "retain_target",
        "retain_others",
        "retained_classes",
        "mask_entropy",
    ):
        assert found[f"epoch_{name}"] == pytest.approx(history[name][0])


def test_every_head_of_a_model_is_watched(rng):
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((2,), name="b")}
    outputs = [
        DropMaxHead(5, name="one")(inputs["a"]),
        DropMaxHead(2, name="two", retain_probability=0.25)(inputs["b"]),
    ]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", [DropMaxLoss(), DropMaxLoss()])
    x = {"a": rng.normal(size=(10, 3)), "b": rng.normal(size=(10, 2))}
    y = np.arange(10) % 2
    history = model.fit(x, [y, y], callbacks=[DropMaxMonitor(x, y)], verbose=0).history
    assert history["two_retain_target"] == pytest.approx([0.25])
    assert history["two_retained_classes"] == pytest.approx([0.5])
    assert 0 < history["one_retained_classes"][0] < 5


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_sequences_and_subclassed_models(rng, run_eagerly):
    class Tagger(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = DropMaxHead(3)

        def call(self, x):
            return self.head(x)

    x, y = rng.normal(size=(6, 5, 4)).astype("float32"), rng.integers(3, size=(6, 5))
    model = Tagger()
    model.compile("sgd", DropMaxLoss(), run_eagerly=run_eagerly)
    history = model.fit(x, y, callbacks=[DropMaxMonitor(x, y)], verbose=0).history
    rho = model.head.retain_probabilities(x).numpy()
    expected = np.mean([rho[i, j, y[i, j]] for i in range(6) for j in range(5)])
    assert history["retain_target"][0] == pytest.approx(expected, rel=1e-5)


def test_masked_positions_do_not_count(rng):
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Embedding(7, 4, mask_zero=True), DropMaxHead(3)]
    )
    model.compile("sgd", DropMaxLoss())
    x, y = rng.integers(7, size=(6, 5)), rng.integers(3, size=(6, 5))
    x[0], x[1, 1:] = 0, 0
    monitor = DropMaxMonitor(x, y, batch_size=2)  # a batch counts by its positions, not by its rows
    history = model.fit(x, y, callbacks=[monitor], verbose=0).history
    rho = model.layers[-1].retain_probabilities(model.layers[0](x)).numpy()
    counted = [rho[i, j, y[i, j]] for i in range(6) for j in range(5) if x[i, j]]
    assert 0 < len(counted) < 26
    assert history["retain_target"][0] == pytest.approx(np.mean(counted), rel=1e-5)
    assert history["retained_classes"][0] == pytest.approx(rho.sum(-1)[x != 0].mean(), rel=1e-5)


def test_mistakes(blobs):
    x, y = blobs

    def fit(monitor, model=None):
        (model or model_of()).fit(x, y, callbacks=[monitor], verbose=0)

    plain = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match="at least one DropMaxHead"):
        fit(DropMaxMonitor(x, y), plain)
    for labels in (np.where(y == 3, 4, y), y + 0.5):
        with pytest.raises(tf.errors.InvalidArgumentError, match="whole numbers"):
            fit(DropMaxMonitor(x, labels))
    with pytest.raises(ValueError, match="cardinality"):  # Keras's own message
        fit(DropMaxMonitor(x, y[:5]))


def test_what_users_pass(blobs):
    """Float labels that are whole numbers, and one-hot labels."""
    x, y = blobs
    model = model_of()
    model.compile(keras.optimizers.SGD(0.0), DropMaxLoss())
    expected = statistics(model, x, y)["retain_target"]
    for labels in (y, y.astype("float32"), np.eye(4, dtype=bool)[y]):
        history = model.fit(x, y, callbacks=[DropMaxMonitor(x, labels)], verbose=0).history
        assert history["retain_target"] == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_used_monitor_can_be_copied(blobs, stopped):
    x, y = blobs
    monitor = DropMaxMonitor(x, y)
    model = model_of()

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if stopped:
                raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        model.fit(x, y, callbacks=[monitor, Stop()], verbose=0)
    again = copy.deepcopy(monitor)
    assert again.model is None
    history = model.fit(x, y, callbacks=[again], verbose=0).history
    assert history["retain_target"] == pytest.approx([statistics(model, x, y)["retain_target"]])


def test_heads_with_labels_of_their_own(rng):
    """In the forms that `fit` takes. A head without labels is not logged."""
    inputs = keras.Input((6,))
    heads = {
        name: DropMaxHead(4, name=name, retain={"kernel_initializer": "glorot_uniform"})
        for name in ("one", "two")
    }
    model = keras.Model(inputs, {name: head(inputs) for name, head in heads.items()})
    model.compile("sgd", {name: DropMaxLoss() for name in heads})
    x = rng.normal(size=(40, 6)).astype("float32")
    y = {name: rng.integers(4, size=40) for name in heads}
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    for arguments in [(x, y), (x, [y["one"], y["two"]]), (data,), (x, {"two": y["two"]})]:
        history = model.fit(x, y, callbacks=[DropMaxMonitor(*arguments)], verbose=0).history
        given = ["two"] if len(arguments) == 2 and len(arguments[1]) == 1 else list(heads)
        for name in heads:
            assert (f"{name}_retain_target" in history) == (name in given)
        for name in given:
            rho = heads[name].retain_probabilities(x).numpy()
            expected = rho[np.arange(40), y[name]].mean()
            assert history[f"{name}_retain_target"][0] == pytest.approx(expected, rel=1e-5)
