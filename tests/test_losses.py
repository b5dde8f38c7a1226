import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dropmax import DropMaxLoss, SampledSoftmaxLoss, SparsemaxLoss, functional

LOG_P = np.log([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).astype("float32")


@pytest.mark.parametrize(
    "labels",
    [[0, 2], [[0], [2]], [[1, 0, 0], [0, 0, 1]], np.array([0, 2], "uint8"), np.array([[0.0], [2.0]], "float32")],
    ids=["sparse", "column", "one-hot", "uint8", "float"],
)
def test_hard_labels(labels):
    assert DropMaxLoss()(np.array(labels), LOG_P).numpy() == pytest.approx(-np.log(0.5 * 0.8) / 2, rel=1e-6)


def test_soft_labels():
    labels = np.array([[0.25, 0.75, 0], [0, 0, 1]])
    expected = (-0.25 * np.log(0.5) - 0.75 * np.log(0.3) - np.log(0.8)) / 2
    assert DropMaxLoss()(labels, LOG_P).numpy() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("labels", [np.array([0, 2]), np.eye(3)[[0, 2]]], ids=["sparse", "one-hot"])
def test_label_smoothing_is_that_of_keras(labels):
    expected = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.3)(np.eye(3)[[0, 2]], LOG_P)
    assert DropMaxLoss(label_smoothing=0.3)(labels, LOG_P).numpy() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight", "none", None])
def test_reductions_and_sample_weights_are_those_of_keras(reduction):
    arguments = (np.array([0, 2]), LOG_P, np.array([1.0, 3.0], "float32"))
    expected = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)(*arguments)
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
    with pytest.raises(ValueError, match=r"(?s)without the last axis.*Received: y_true.shape=.*y_pred.shape=\(2, 3\)"):
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
    loss = DropMaxLoss(ignore_class=2, label_smoothing=0.1, reduction="sum", name="mine", dtype="float64")
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert isinstance(again, DropMaxLoss)
    assert again.get_config() == loss.get_config()


def test_sparse_labels_survive_a_narrow_float_default():
    """Keras casts labels to the dtype of the loss; float16 would round class 4,097 to another."""
    keras.config.set_floatx("float16")
    try:
        loss = DropMaxLoss()
    finally:
        keras.config.set_floatx("float32")
    log_p = np.zeros((1, 5000), "float32")
    log_p[0, 4097] = -3
    assert loss([4097], log_p).numpy() == 3


LOGITS = np.array([[2.0, 1.5, -1.0], [0.1, 0.2, 0.3]], "float32")


def test_sparsemax_loss():
    for labels in (np.array([1, 2]), np.eye(3)[[1, 2]]):
        expected = -np.mean(functional.sparsemax_scores(LOGITS).numpy()[[0, 1], [1, 2]])
        assert SparsemaxLoss()(labels, LOGITS).numpy() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="Labels must have the shape"):
        SparsemaxLoss()(np.zeros(5), LOGITS)


@pytest.mark.parametrize("sampler", ["uniform", "learned_unigram"])
def test_sampled_softmax_loss(sampler):
    logits = np.tile(np.linspace(0, 1, 10, dtype="float32"), (4, 1))
    values = [float(SampledSoftmaxLoss(0.4, sampler, seed=s)(np.arange(4), logits)) for s in range(30)]
    full = float(DropMaxLoss()(np.arange(4), functional.softmax(logits)))
    assert len(set(values)) > 20
    assert all(np.log(2) < value < full for value in values)
    loss = SampledSoftmaxLoss(0.4, sampler, seed=5)
    assert float(loss(np.arange(4), logits)) == values[5]
    assert float(loss(np.arange(4), logits)) != values[5]


@pytest.mark.parametrize("form", ["sparse", "column", "one-hot"])
def test_learned_unigram_counts_labels(form):
    loss = SampledSoftmaxLoss(0.5, "learned_unigram", seed=1)
    labels = np.array([0, 0, 2, 0])
    labels = {"sparse": labels, "column": labels[:, None], "one-hot": np.eye(4)[labels]}[form]
    call = tf.function(loss)
    for _ in range(2):
        call(tf.constant(labels), tf.zeros((4, 4)))
    np.testing.assert_array_equal(loss._counts, [7, 1, 3, 1])
    loss = SampledSoftmaxLoss(0.5, "learned_unigram", seed=1, ignore_class=0)
    loss(np.array([0, 0, 2, 0]), np.zeros((4, 4), "float32"))
    np.testing.assert_array_equal(loss._counts, [1, 1, 2, 1])


@pytest.mark.parametrize("settings", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=str)
@pytest.mark.parametrize("make", [SparsemaxLoss, lambda: SampledSoftmaxLoss(0.5, "learned_unigram", seed=1)])
def test_baseline_losses_train(blobs, make, settings):
    x, y = blobs
    initializer = keras.initializers.GlorotUniform(seed=1)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, kernel_initializer=initializer)])
    model.compile(keras.optimizers.Adam(0.05), make(), metrics=["accuracy"], **settings)
    history = model.fit(x, y, epochs=12, shuffle=False, verbose=0).history
    assert history["accuracy"][-1] > 0.9


@pytest.mark.parametrize(
    "arguments", [{"sample_fraction": 0}, {"sample_fraction": 1.0}, {"sampler": "zipf"}, {"seed": 1.5}], ids=str
)
def test_bad_arguments_of_sampled_softmax(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises((ValueError, TypeError), match=f"{name}.*Received.*{value}"):
        SampledSoftmaxLoss(**{"sample_fraction": 0.5, **arguments})
    with pytest.raises(ValueError, match="2 or more"):
        SampledSoftmaxLoss(0.5)([0], np.zeros((1, 1)))


@pytest.mark.parametrize("loss", [SparsemaxLoss(label_smoothing=0.1), SampledSoftmaxLoss(0.3, "learned_unigram", seed=4)])
def test_configs_of_the_baseline_losses(loss):
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert type(again) is type(loss)
    assert again.get_config() == loss.get_config()
