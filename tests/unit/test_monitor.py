import contextlib
import copy

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dropmax import DropMaxHead, DropMaxLoss, DropMaxMonitor


def model_of(**kwargs):
    head = DropMaxHead(
        4, seed=1, retain_kernel_initializer=keras.initializers.RandomNormal(seed=3), **kwargs
    )
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "relu"), head])
    model.compile(keras.optimizers.Adam(0.02), DropMaxLoss())
    return model


def statistics(model, x, y):
    """One example after the other, in the words of the documentation."""
    features = model.layers[0](x).numpy()
    head = model.layers[1]
    rows = []
    for h, label in zip(features, y, strict=True):
        r = h.astype("float64") @ head.retain_kernel.numpy() + head.retain_bias.numpy()
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


def test_annealing_trains_with_what_the_schedule_says(blobs):
    """The same losses as three heads, each built with the settings of one epoch."""
    x, y = blobs
    schedules = {
        "entropy_weight": lambda epoch: [1.0, 0.3, 0.0][epoch],
        "temperature": lambda epoch: 0.1 * (epoch + 1),
    }
    model = model_of()
    model.compile(keras.optimizers.SGD(0.0), DropMaxLoss())
    steps = model.layers[1]._train_seeds.state.numpy()
    rewind = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: model.layers[1]._train_seeds.state.assign(steps)
    )
    fit = {"batch_size": 160, "shuffle": False, "verbose": 0}
    history = model.fit(
        x, y, epochs=3, callbacks=[DropMaxMonitor(**schedules), rewind], **fit
    ).history
    assert history["entropy_weight"] == [1.0, 0.3, 0.0]
    assert history["temperature"] == pytest.approx([0.1, 0.2, 0.3])
    assert "retain_target" not in history
    for epoch in range(3):
        fresh = model_of(**{name: schedule(epoch) for name, schedule in schedules.items()})
        fresh.compile(keras.optimizers.SGD(0.0), DropMaxLoss())
        fresh.set_weights(model.get_weights())
        assert fresh.fit(x, y, **fit).history["loss"][0] == pytest.approx(
            history["loss"][epoch], rel=1e-5
        )
    assert len(set(np.round(history["loss"], 3))) == 3


def test_tensorboard_gets_it_too(blobs, tmp_path):
    x, y = blobs
    callbacks = [
        DropMaxMonitor(x, y, entropy_weight=lambda epoch: 0.5),
        keras.callbacks.TensorBoard(tmp_path),
    ]
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
        "entropy_weight",
    ):
        assert found[f"epoch_{name}"] == pytest.approx(history[name][0])


def test_every_head_of_a_model_is_watched_and_annealed(rng):
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((2,), name="b")}
    outputs = [
        DropMaxHead(5, name="one")(inputs["a"]),
        DropMaxHead(2, name="two", retain_probability=0.25)(inputs["b"]),
    ]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", [DropMaxLoss(), DropMaxLoss()])
    x = {"a": rng.normal(size=(10, 3)), "b": rng.normal(size=(10, 2))}
    y = np.arange(10) % 2
    monitor = DropMaxMonitor(x, y, temperature=lambda epoch: 0.4)
    history = model.fit(x, [y, y], callbacks=[monitor], verbose=0).history
    assert history["two_retain_target"] == pytest.approx([0.25])
    assert history["two_retained_classes"] == pytest.approx([0.5])
    assert 0 < history["one_retained_classes"][0] < 5
    assert [layer.temperature for layer in model.layers if isinstance(layer, DropMaxHead)] == [
        0.4,
        0.4,
    ]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Expected `x` with `y`"),
        ({"x": np.ones((3, 2))}, "Expected `x` with `y`"),
        ({"x": np.ones((3, 2)), "y": np.zeros(2, int)}, "as many examples.*2 and 3 examples"),
        ({"x": np.ones((3, 2)), "y": np.full(3, 0.5)}, "whole numbers"),
        ({"x": np.ones((3, 2)), "y": np.array(["a", "b", "c"])}, "whole numbers"),
        ({"x": [[1.0, 2.0], [3.0, 4.0]], "y": [0, 1]}, "must be arrays.*np.asarray"),
        ({"entropy_weight": 0.3}, "`entropy_weight` must be a function"),
        (
            {"temperature": lambda epoch: 1.0, "batch_size": 0},
            "`batch_size` must be a positive int",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DropMaxMonitor(**arguments)


def test_mistakes_that_show_in_training(blobs):
    x, y = blobs
    with pytest.raises(ValueError, match="entropy_weight=-1"):
        model_of().fit(x, y, callbacks=[DropMaxMonitor(entropy_weight=lambda epoch: -1)], verbose=0)
    plain = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    plain.compile("sgd", DropMaxLoss())
    with pytest.raises(ValueError, match="at least one DropMaxHead"):
        plain.fit(x, y, callbacks=[DropMaxMonitor(x, y)], verbose=0)
    wrong = y.copy()
    wrong[3] = 4
    with pytest.raises(ValueError, match=r"in \[0, 4\)"):
        model_of().fit(x, y, callbacks=[DropMaxMonitor(x, wrong)], verbose=0)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, "auxiliary_weight"),
        ({"stochastic": False}, "temperature"),
        ({"retain_probability": 0.4}, "entropy_weight"),
    ],
)
def test_a_setting_without_effect(blobs, arguments, name):
    with pytest.raises(ValueError, match=f"on which `{name}` has an effect"):
        model_of(**arguments).fit(*blobs, callbacks=[DropMaxMonitor(**{name: float})], verbose=0)


def test_what_users_pass(blobs):
    """Float labels that are whole numbers, lists of labels, and schedules of Keras."""
    x, y = blobs
    model = model_of()
    model.compile(keras.optimizers.SGD(0.0), DropMaxLoss())
    expected = statistics(model, x, y)["retain_target"]
    for labels in (y, y.astype("float32"), y.tolist(), np.eye(4, dtype=bool)[y]):
        history = model.fit(x, y, callbacks=[DropMaxMonitor(x, labels)], verbose=0).history
        assert history["retain_target"] == pytest.approx([expected], rel=1e-5)
    decay = keras.optimizers.schedules.ExponentialDecay(0.5, decay_steps=1, decay_rate=0.1)
    monitor = DropMaxMonitor(entropy_weight=decay, auxiliary_weight=lambda epoch: np.float32(2.0))
    model = model_of(posterior="label")
    history = model.fit(x, y, epochs=3, callbacks=[monitor], verbose=0).history
    assert history["entropy_weight"] == pytest.approx([0.5, 0.05, 0.005], rel=1e-6)
    assert history["auxiliary_weight"] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_used_monitor_can_be_copied(blobs, stopped):
    x, y = blobs
    monitor = DropMaxMonitor(x, y, temperature=lambda epoch: 0.3)
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
    assert history["temperature"] == pytest.approx([0.3])
    assert history["retain_target"] == pytest.approx([statistics(model, x, y)["retain_target"]])


def test_heads_of_one_name_are_refused(blobs):
    x, y = blobs
    inputs = keras.Input((6,))
    parts = [keras.Sequential([DropMaxHead(4, name="head")], name=name) for name in ("a", "b")]
    model = keras.Model(inputs, [part(inputs) for part in parts])
    model.compile("sgd", [DropMaxLoss(), DropMaxLoss()])
    with pytest.raises(ValueError, match=r"different names.*\['head', 'head'\]"):
        model.fit(x, [y, y], callbacks=[DropMaxMonitor(x, y)], verbose=0)
    schedule = DropMaxMonitor(entropy_weight=lambda epoch: 0.5)
    model.fit(x, [y, y], callbacks=[schedule], verbose=0)
