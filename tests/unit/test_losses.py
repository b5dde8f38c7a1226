import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.testing import TestCase
from models import VARIANTS

from tf_dropmax import DropMaxHead, DropMaxLoss

LOG_P = np.log([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).astype("float32")


def test_soft_labels():
    labels = np.array([[0.25, 0.75, 0], [0, 0, 1]])
    expected = (-0.25 * np.log(0.5) - 0.75 * np.log(0.3) - np.log(0.8)) / 2
    assert DropMaxLoss()(labels, LOG_P).numpy() == pytest.approx(expected)


@pytest.mark.parametrize("labels", [np.array([0, 2]), np.eye(3)[[0, 2]]], ids=["sparse", "one-hot"])
def test_label_smoothing_equals_that_of_keras(labels):
    reference = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.3)
    value = DropMaxLoss(label_smoothing=0.3)(labels, LOG_P).numpy()
    assert value == pytest.approx(float(reference(np.eye(3)[[0, 2]], LOG_P)))


@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight", "none", None]
)
def test_reductions_and_sample_weights_equal_those_of_keras(reduction):
    arguments = (np.array([0, 2]), LOG_P, np.array([1.0, 3.0], "float32"))
    reference = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    value = DropMaxLoss(reduction=reduction)(*arguments)
    np.testing.assert_allclose(value, reference(*arguments), rtol=1e-6)


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
@pytest.mark.parametrize("compiled", [False, True])
def test_the_message_of_a_label_out_of_range(label, compiled):
    """`test_labels.py` tests the other losses, and labels under XLA."""
    call = tf.function(DropMaxLoss()) if compiled else DropMaxLoss()
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        call(tf.constant([1, label], "float32"), tf.constant(LOG_P))
    ends = ("nan", "nan") if np.isnan(label) else (min(1, label), max(1, label))
    words = re.sub(r"[\[\]]|\.0\b", "", str(error.value))
    low, high = (f"{end:.6g}" for end in map(float, ends))
    assert "DropMaxLoss: sparse labels must be whole numbers in 0, 3). Received: from" in words
    assert label == 2**40 or f"from {low} to {high}" in words


# What a layer other than the head returns: logits, and probabilities.
WRONG = {"logits": [[0.2, -0.1, 2.0], [0.1, 3.0, 0.3]], "softmax": np.exp(LOG_P)}


@pytest.mark.parametrize("y_pred", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("jit_compile", [None, False, True], ids=["eager", "graph", "xla"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_what_is_not_the_output_of_a_head(y_pred, jit_compile, smoothing):
    loss = DropMaxLoss(label_smoothing=smoothing)
    call = loss if jit_compile is None else tf.function(loss, jit_compile=jit_compile)
    for labels in (tf.constant([0, 1]), tf.constant(np.eye(3, dtype="float32")[[0, 1]])):
        if jit_compile:
            assert np.isnan(call(labels, tf.constant(y_pred, "float32")))
            continue
        with pytest.raises(
            tf.errors.InvalidArgumentError, match="needs the output of `DropMaxHead"
        ):
            call(labels, tf.constant(y_pred, "float32"))


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e5, 1e36, np.nan])
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_the_loss_accepts_every_output_of_a_head(rng, settings, scale):
    features = (scale * rng.normal(size=(64, 5))).astype("float32")
    loss, labels = tf.function(DropMaxLoss(reduction=None)), rng.integers(10, size=64)
    head = DropMaxHead(10, seed=1, **settings)
    for training in (False, True):
        assert not (loss(labels, head(features, training=training)).numpy() < -1e-4).any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"ignore_class": 1.0},
        {"label_smoothing": -0.1},
        {"label_smoothing": 1},
        {"label_smoothing": "0.1"},
        {"reduction": "average"},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_bad_arguments(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises((TypeError, ValueError), match=f"(?s){name}.*Received.*{value}"):
        DropMaxLoss(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"ignore_class": 2, "label_smoothing": 0.1},
        {"reduction": "sum", "name": "mine", "dtype": "float64"},
    ],
    ids=str,
)
def test_config_round_trip(arguments):
    loss = DropMaxLoss(**arguments)
    assert arguments.items() <= loss.get_config().items()
    TestCase().run_class_serialization_test(loss)


@pytest.mark.parametrize("form", ["sparse", "column"])
def test_ignored_positions_and_keras_masks_are_left_out_together(form):
    log_p, labels = tf.constant(np.stack([LOG_P, LOG_P])), np.array([[0, -1], [0, 2]])
    log_p._keras_mask = tf.constant([[True, True], [False, True]])
    labels = labels[..., np.newaxis] if form == "column" else labels
    loss = DropMaxLoss(ignore_class=-1)(labels, log_p)
    assert loss.numpy() == pytest.approx(-np.log(0.5 * 0.8) / 2, rel=1e-6)


def test_large_class_indices_with_floatx_float16():
    """Keras casts labels to the dtype of the loss. In float16, 4097 is rounded to 4096."""
    keras.config.set_floatx("float16")
    log_p = np.zeros((1, 5000), "float32")
    log_p[0, 4097] = -3
    assert DropMaxLoss()([4097], log_p).numpy() == 3


def test_labels_of_another_rank_need_another_compile(rng):
    model = keras.Sequential([keras.Input((3,)), DropMaxHead(4)])
    model.compile("sgd", DropMaxLoss())
    x, y = rng.normal(size=(8, 3)), np.arange(8, dtype="float32") % 4
    one_hot = np.eye(4, dtype="float32")[y.astype(int)]
    model.fit(x, y, verbose=0)
    with pytest.raises(ValueError, match=r"(?s)Labels must.*y_pred.*another rank.*compile"):
        model.fit(x, one_hot, verbose=0)
    model.compile("sgd", DropMaxLoss())
    model.fit(x, one_hot, verbose=0)
