import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.testing import TestCase

from tf_dropmax import DropMaxLoss

LOG_P = np.log([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).astype("float32")


@pytest.mark.parametrize(
    "labels",
    [
        [0, 2],
        [[0], [2]],
        [[1, 0, 0], [0, 0, 1]],
        np.array([0, 2], "uint8"),
        np.array([[0.0], [2.0]], "float32"),
    ],
    ids=["sparse", "column", "one-hot", "uint8", "float"],
)
def test_hard_labels(labels):
    assert DropMaxLoss()(np.array(labels), LOG_P).numpy() == pytest.approx(
        -np.log(0.5 * 0.8) / 2, rel=1e-6
    )


def test_soft_labels():
    labels = np.array([[0.25, 0.75, 0], [0, 0, 1]])
    expected = (-0.25 * np.log(0.5) - 0.75 * np.log(0.3) - np.log(0.8)) / 2
    assert DropMaxLoss()(labels, LOG_P).numpy() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("labels", [np.array([0, 2]), np.eye(3)[[0, 2]]], ids=["sparse", "one-hot"])
def test_label_smoothing_equals_that_of_keras(labels):
    expected = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.3)(
        np.eye(3)[[0, 2]], LOG_P
    )
    assert DropMaxLoss(label_smoothing=0.3)(labels, LOG_P).numpy() == pytest.approx(
        float(expected), rel=1e-6
    )


@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight", "none", None]
)
def test_reductions_and_sample_weights_equal_those_of_keras(reduction):
    arguments = (np.array([0, 2]), LOG_P, np.array([1.0, 3.0], "float32"))
    expected = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)(
        *arguments
    )
    np.testing.assert_allclose(DropMaxLoss(reduction=reduction)(*arguments), expected, rtol=1e-6)


@pytest.mark.parametrize("ignored", [-1, 255, 1])
def test_ignore_class(ignored):
    log_p, labels = np.stack([LOG_P, LOG_P]), np.array([[0, ignored], [ignored, 2]])
    loss = DropMaxLoss(ignore_class=ignored)(labels, log_p)
    assert loss.numpy() == pytest.approx(-np.log(0.5 * 0.8) / 2, rel=1e-6)
    values = DropMaxLoss(ignore_class=ignored, reduction=None)(labels, log_p)
    np.testing.assert_allclose(values, [[-np.log(0.5), 0], [0, -np.log(0.8)]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"sparse.*\(2, 2, 3\)"):
        DropMaxLoss(ignore_class=ignored)(np.ones((2, 2, 3)), log_p)


@pytest.mark.parametrize("label", [3, -1, 0.5, np.nan, 2**40])
@pytest.mark.parametrize("graph", [False, True])
def test_label_out_of_range_raises(label, graph):
    call = tf.function(DropMaxLoss()) if graph else DropMaxLoss()
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"whole numbers in \[0, T\)"):
        call(tf.constant([0, label], "float32"), tf.constant(LOG_P))


@pytest.mark.parametrize("label", [3, -1, 0.5])
def test_label_out_of_range_is_nan_under_xla(label):
    call = tf.function(DropMaxLoss(), jit_compile=True)
    assert np.isnan(call(tf.constant([0, label], "float32"), tf.constant(LOG_P)))
    assert np.isfinite(call(tf.constant([0.0, 1.0]), tf.constant(LOG_P)))


@pytest.mark.parametrize("shape", [(3,), (2, 2), (2, 4), (3, 1), (2, 1, 1), (2, 3, 1), ()])
def test_labels_of_another_shape(shape):
    with pytest.raises(
        ValueError,
        match=r"without the last dimension.*Received: y_true.shape=.*y_pred.shape=\(2, 3\)",
    ):
        DropMaxLoss()(np.zeros(shape), LOG_P)


@pytest.mark.parametrize(
    "arguments",
    [
        {"ignore_class": 1.0},
        {"ignore_class": True},
        {"label_smoothing": -0.1},
        {"label_smoothing": 1},
        {"label_smoothing": "0.1"},
        {"dtype": "float16"},
        {"dtype": "mixed_bfloat16"},
        {"reduction": "average"},
    ],
    ids=str,
)
def test_bad_arguments(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"(?s){name}.*Received.*{value}"):
        DropMaxLoss(**arguments)


def test_config_round_trip():
    loss = DropMaxLoss(
        ignore_class=2, label_smoothing=0.1, reduction="sum", name="mine", dtype="float64"
    )
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert isinstance(again, DropMaxLoss)
    assert again.get_config() == loss.get_config()


@pytest.mark.parametrize("arguments", [{}, {"ignore_class": 2, "label_smoothing": 0.1}], ids=str)
def test_the_serialization_test_of_keras(arguments):
    TestCase().run_class_serialization_test(DropMaxLoss(**arguments))


@pytest.mark.parametrize("form", ["sparse", "column"])
def test_ignored_positions_and_keras_masks_are_left_out_together(form):
    log_p, labels = tf.constant(np.stack([LOG_P, LOG_P])), np.array([[0, -1], [0, 2]])
    log_p._keras_mask = tf.constant([[True, True], [False, True]])
    labels = labels[..., np.newaxis] if form == "column" else labels
    loss = DropMaxLoss(ignore_class=-1)(labels, log_p)
    assert loss.numpy() == pytest.approx(-np.log(0.5 * 0.8) / 2, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradient(smoothing):
    log_p = tf.constant(LOG_P)
    for labels in (np.array([0, 2]), np.eye(3)[[0, 2]]):
        with tf.GradientTape() as tape:
            tape.watch(log_p)
            loss = DropMaxLoss(label_smoothing=smoothing, reduction="sum")(labels, log_p)
        expected = -(1 - smoothing) * np.eye(3)[[0, 2]] - smoothing / 3
        np.testing.assert_allclose(tape.gradient(loss, log_p), expected, rtol=1e-6)


def test_large_class_indices_with_floatx_float16():
    """Keras casts labels to the dtype of the loss. In float16, 4097 is rounded to 4096."""
    keras.config.set_floatx("float16")
    try:
        loss = DropMaxLoss()
    finally:
        keras.config.set_floatx("float32")
    log_p = np.zeros((1, 5000), "float32")
    log_p[0, 4097] = -3
    assert loss([4097], log_p).numpy() == 3


def test_labels_of_another_rank_need_another_compile(rng):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    model.compile("sgd", DropMaxLoss())
    x, y = rng.normal(size=(8, 3)), np.arange(8, dtype="float32") % 4
    one_hot = np.eye(4, dtype="float32")[y.astype(int)]
    model.fit(x, y, verbose=0)
    with pytest.raises(ValueError, match=r"(?s)Labels must.*y_pred.*another rank.*compile"):
        model.fit(x, one_hot, verbose=0)
    model.compile("sgd", DropMaxLoss())
    model.fit(x, one_hot, verbose=0)
