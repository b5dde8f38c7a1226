"""`DropMaxMonitor`: it logs the right numbers for every form of data."""

import contextlib
import copy

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import GLOROT, classifier

from tf_dropmax import DropMaxHead, DropMaxLoss, DropMaxMonitor

NAMES = ["retain_target", "retain_others", "retained_classes", "mask_entropy"]


def statistics(model, x, y):
    """One example after the other, in the words of the documentation."""
    hidden, head = model.layers
    kernel, bias = (weight.numpy() for weight in head.branches["retain"].weights)
    rows = []
    for h, label in zip(hidden(x).numpy().astype("float64"), y, strict=True):
        rho = 1 / (1 + np.exp(-(h @ kernel + bias)))
        others = [rho[t] for t in range(4) if t != label]
        entropy = [-q * np.log(q) - (1 - q) * np.log(1 - q) for q in rho]
        rows.append([rho[label], np.mean(others), np.sum(rho), np.mean(entropy)])
    return dict(zip(NAMES, np.mean(rows, 0), strict=True))


FORMS = {
    "sparse": lambda y: y,
    "column": lambda y: y[:, None],
    "float": lambda y: y.astype("float32"),
    "one-hot": lambda y: np.eye(4)[y],
    "bool": lambda y: np.eye(4, dtype=bool)[y],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_statistics_are_those_of_the_definition(blobs, form):
    x, y = blobs
    model = classifier({})
    monitor = DropMaxMonitor(x, form(y), batch_size=37)  # The last batch is a smaller one.
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
        model = classifier({}, predict_mode="sampled", predict_samples=2)
        model.fit(x, y, epochs=2, callbacks=callbacks, verbose=0, shuffle=False)
        drawn.append(model.predict(x, verbose=0))
    np.testing.assert_array_equal(*drawn)


def test_tensorboard_gets_it_too(blobs, tmp_path):
    x, y = blobs
    callbacks = [DropMaxMonitor(x, y), keras.callbacks.TensorBoard(tmp_path)]
    classifier({}).fit(x, y, callbacks=callbacks, verbose=0)
    (path,) = (tmp_path / "train").glob("events*")
    events = tf.compat.v1.train.summary_iterator(str(path))
    found = {value.tag for event in events for value in event.summary.value}
    assert {f"epoch_{name}" for name in NAMES} <= found


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
    embedding = keras.layers.Embedding(7, 4, mask_zero=True)
    model = keras.Sequential([keras.Input((5,)), embedding, DropMaxHead(3)])
    model.compile("sgd", DropMaxLoss())
    x, y = rng.integers(7, size=(6, 5)), rng.integers(3, size=(6, 5))
    x[0], x[1, 1:] = 0, 0
    monitor = DropMaxMonitor(x, y, batch_size=2)  # a batch counts by its positions, not by its rows
    history = model.fit(x, y, callbacks=[monitor], verbose=0).history
    rho = model.layers[-1].retain_probabilities(embedding(x)).numpy()
    counted = [rho[i, j, y[i, j]] for i in range(6) for j in range(5) if x[i, j]]
    assert 0 < len(counted) < 26
    assert history["retain_target"][0] == pytest.approx(np.mean(counted), rel=1e-5)
    assert history["retained_classes"][0] == pytest.approx(rho.sum(-1)[x != 0].mean(), rel=1e-5)
    weights = rng.random(6)
    monitor = DropMaxMonitor(tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(2))
    history = model.fit(x, y, callbacks=[monitor], verbose=0).history
    rho = model.layers[-1].retain_probabilities(embedding(x)).numpy()
    expected = np.average(rho.sum(-1), weights=weights[:, None] * (x != 0))
    assert history["retained_classes"][0] == pytest.approx(expected, rel=1e-5)


def test_mistakes(blobs):
    x, y = blobs

    def fit(monitor, model=None):
        (model or classifier({})).fit(x, y, callbacks=[monitor], verbose=0)

    plain = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match="at least one DropMaxHead"):
        fit(DropMaxMonitor(x, y), plain)
    for labels in (np.where(y == 3, 4, y), y + 0.5):
        with pytest.raises(tf.errors.InvalidArgumentError, match="whole numbers"):
            fit(DropMaxMonitor(x, labels))
    with pytest.raises(ValueError, match="cardinality"):  # Keras's own message
        fit(DropMaxMonitor(x, y[:5]))


@pytest.mark.parametrize("stopped", [False, True])
def test_a_used_monitor_can_be_copied(blobs, stopped):
    x, y = blobs
    monitor = DropMaxMonitor(x, y)
    model = classifier({})

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


def test_a_head_on_the_predictions_of_another(rng):
    inputs = keras.Input((6,))
    first, second = (DropMaxHead(4, name=name, retain=GLOROT) for name in ("one", "two"))
    log_p = first(inputs)
    model = keras.Model(inputs, {"one": log_p, "two": second(keras.ops.exp(log_p))})
    model.compile(keras.optimizers.SGD(0.0), {"one": DropMaxLoss(), "two": DropMaxLoss()})
    x, y = rng.normal(size=(40, 6)).astype("float32"), rng.integers(4, size=40)
    labels = {"one": y, "two": y}
    history = model.fit(x, labels, callbacks=[DropMaxMonitor(x, labels)], verbose=0).history
    rho = second.retain_probabilities(np.exp(model.predict(x, verbose=0)["one"])).numpy()
    assert history["two_retained_classes"] == pytest.approx([rho.sum(-1).mean()], rel=1e-5)


def test_heads_with_labels_of_their_own(rng):
    """In the forms that `fit` takes. A head without labels is not logged."""
    inputs = keras.Input((6,))
    heads = {name: DropMaxHead(4, name=name, retain=GLOROT) for name in ("one", "two")}
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
