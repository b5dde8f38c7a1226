"""The forms of labels, alone and through `fit` with unknown static shapes."""

from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_dropmax
from tf_dropmax.labels import are_sparse, at_label, label_weights

T = 4
LOSSES = {
    "DropMaxLoss": tf_dropmax.DropMaxLoss,
    "SparsemaxLoss": tf_dropmax.SparsemaxLoss,
    "SampledSoftmaxLoss": lambda: tf_dropmax.SampledSoftmaxLoss(0.5, "learned_unigram", seed=1),
}
METRICS = {
    "NegativeLogLikelihood": tf_dropmax.NegativeLogLikelihood,
    "BrierScore": tf_dropmax.BrierScore,
    "ExpectedCalibrationError": tf_dropmax.ExpectedCalibrationError,
}
RETAIN_METRICS = {
    "TargetRetainProbability": tf_dropmax.TargetRetainProbability,
    "NonTargetRetainProbability": tf_dropmax.NonTargetRetainProbability,
    "RetainedClasses": tf_dropmax.RetainedClasses,
}
EVERYTHING = {**LOSSES, **METRICS, **RETAIN_METRICS}


@pytest.mark.parametrize(
    "dtype", ["uint8", "int32", "int64", "float16", "float32", "float64", "bool"]
)
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (0, 3), (1, 1, 2, 1, 2, 1, 2)])
def test_label_entries_agree_with_a_loop(rng, dtype, leading):
    values = rng.normal(size=(*leading, T))
    labels = rng.integers(2 if dtype == "bool" else T, size=leading)
    expected = np.empty(leading)
    for index in np.ndindex(*leading):
        expected[index] = values[(*index, labels[index])]
    for form in (labels, labels[..., np.newaxis], np.eye(T)[labels]):
        np.testing.assert_array_equal(at_label(form.astype(dtype), values, name="test"), expected)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("leading", [(), (0,), (6,), (2, 3)])
def test_gradients_of_label_entries(rng, leading, jit_compile):
    values = tf.constant(rng.normal(size=(*leading, T)))
    labels, upstream = rng.integers(T, size=leading), rng.normal(size=leading)

    @tf.function(jit_compile=jit_compile)
    def gradient():
        with tf.GradientTape() as tape:
            tape.watch(values)
            entries = at_label(labels, values, name="test")
        return tape.gradient(entries, values, upstream)

    np.testing.assert_array_equal(gradient(), upstream[..., np.newaxis] * np.eye(T)[labels])


def test_losses_of_single_examples_can_be_vectorized(rng):
    labels, values = tf.constant([1, 3]), tf.constant(-rng.random(size=(2, T)))
    loss = tf_dropmax.DropMaxLoss(reduction=None, dtype="float64")

    def gradient(example):
        label, row = example
        with tf.GradientTape() as tape:
            tape.watch(row)
            value = loss.call(label, row)
        return tape.gradient(value, row)

    gradients = tf.vectorized_map(gradient, (labels, values), fallback_to_while_loop=False)
    np.testing.assert_array_equal(gradients, -np.eye(T)[[1, 3]])


def test_label_weights_are_one_hot_rows():
    values = tf.zeros((3, T))
    for labels in ([2, 0, 3], [[2], [0], [3]], np.eye(T)[[2, 0, 3]]):
        weights = label_weights(tf.constant(labels), values, name="test")
        np.testing.assert_array_equal(weights, np.eye(T)[[2, 0, 3]])
    weights = label_weights(tf.constant([-1, 4, 1]), values, name="test")
    np.testing.assert_array_equal(weights, [[0] * T, [0] * T, [0, 1, 0, 0]])


@pytest.mark.parametrize(
    ("labels", "predictions", "sparse"),
    [
        ((None,), (None, T), True),
        ((None, 1), (None, T), True),
        ((None, 1), (None, None), True),
        ((None, 1), (None, 1), True),
        ((None, 5), (2, None, T), True),
        ((None, None, 1), (None, None, T), True),
        ((None, T), (None, T), False),
        ((None, None), (2, T), False),
        ((None, T), (None, None), False),
        ((None, None), (None, None), False),
        ((None, None, None), (None, None, T), False),
    ],
    ids=str,
)
def test_static_shapes_decide_the_form(labels, predictions, sparse):
    shapes = tf.TensorSpec(labels), tf.TensorSpec(predictions)
    assert are_sparse(*shapes, name="test") is sparse


@pytest.mark.parametrize(
    ("labels", "predictions"),
    [
        ((), (None, T)),
        ((3,), (2, T)),
        ((None, 3), (None, T)),
        ((None, 2), (None, T)),
        ((3, 1), (2, T)),
        ((3, None), (2, T)),
        ((None, 1, 1), (None, T)),
        ((None, None, None), (None, T)),
        ((None,), (None, None, T)),
        (None, (None, T)),
        ((None,), None),
        ((None, T), ()),
    ],
    ids=str,
)
def test_static_shapes_that_do_not_fit(labels, predictions):
    with pytest.raises(ValueError, match=r"test: Labels must have the shape.*Received: y_true.sh"):
        are_sparse(tf.TensorSpec(labels), tf.TensorSpec(predictions), name="test")


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(
    ("labels", "specs"),
    [
        ([1, 3], [(None,), (None, T)]),
        ([[1], [3]], [(None, 1), (None, T)]),
        (np.eye(T)[[1, 3]], [(None, None), (None, T)]),
        (np.eye(T)[[1, 3]], [(None, None), (None, None)]),
        ([[[1], [3]]], [(None, None, 1), (None, None, T)]),
        (np.eye(T)[[[1, 3]]], [(None, None, None), (None, None, T)]),
    ],
    ids=str,
)
def test_unknown_static_dimensions(rng, labels, specs, jit_compile):
    values = rng.normal(size=(*np.shape(labels)[: len(specs[1]) - 1], T))
    specs = [tf.TensorSpec(spec, "float64") for spec in specs]
    call = tf.function(partial(at_label, name="test"), specs, jit_compile=jit_compile)
    entries = call(tf.constant(labels, "float64"), tf.constant(values))
    rows = values.reshape(-1, T)
    np.testing.assert_allclose(np.ravel(entries), [rows[0, 1], rows[1, 3]], rtol=1e-12)


# Every pair would broadcast.
WRONG_AT_RUN_TIME = [
    ((2, 1), (None, None), (2, T)),
    ((3, T), (None, None), (1, T)),
    ((1, T), (None, T), (3, T)),
    ((3,), (None,), (1, T)),
    ((1,), (None,), (3, T)),
    ((3, 1), (None, 1), (1, T)),
    ((3, 2), (None, None), (1, 2, T)),
    ((1, 2, T), (None, None, None), (3, 2, T)),
]


def traced(call, label_spec, rank, jit_compile):
    """`call`, traced for predictions with T classes and unknown other dimensions."""
    specs = [tf.TensorSpec(label_spec), tf.TensorSpec((*[None] * (rank - 1), T))]
    return tf.function(lambda y, p: call(y, p), specs, jit_compile=jit_compile)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(("labels", "label_spec", "predictions"), WRONG_AT_RUN_TIME, ids=str)
def test_shapes_that_do_not_fit_at_run_time(labels, label_spec, predictions, jit_compile):
    call = traced(partial(at_label, name="test"), label_spec, len(predictions), jit_compile)
    message = "same size and shape" if jit_compile else "test: Labels must have the shape"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        call(tf.zeros(labels), tf.zeros(predictions))


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("name", EVERYTHING)
def test_losses_and_metrics_check_shapes_at_run_time(name, jit_compile):
    call = traced(EVERYTHING[name](), (None, None), 2, jit_compile)
    message = "same size and shape" if jit_compile else f"{name}: Labels must have the shape"
    assert np.isfinite(call(tf.constant(np.eye(T, dtype="float32")[:2]), tf.zeros((2, T))))
    for shape in ((2, 1), (1, T)):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            call(tf.zeros(shape), tf.zeros((2, T)))


@pytest.mark.parametrize("name", EVERYTHING)
def test_invalid_labels(name):
    """Errors name the class that was called. Under XLA the result is NaN."""
    with pytest.raises(ValueError, match=f"^{name}: Labels must have the shape"):
        EVERYTHING[name]()(tf.zeros((2, T - 1)), tf.zeros((2, T)))
    arguments = tf.constant([0.0, T]), tf.zeros((2, T))
    message = rf"{name}: sparse labels must be whole numbers in \[0, 4\)"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message) as error:
        EVERYTHING[name]()(*arguments)
    assert name == "DropMaxLoss" or "DropMaxLoss" not in str(error.value)
    if name != "RetainedClasses":  # It does not depend on the labels.
        assert np.isnan(tf.function(EVERYTHING[name](), jit_compile=True)(*arguments))


@pytest.mark.parametrize("name", EVERYTHING)
def test_no_constant_is_nan(name):
    tf.debugging.enable_check_numerics()
    try:
        for call in (EVERYTHING[name](), tf.function(EVERYTHING[name]())):
            assert np.isfinite(call(tf.constant([0, 3]), tf.zeros((2, T))))
    finally:
        tf.debugging.disable_check_numerics()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", EVERYTHING)
def test_other_floatx(name, dtype):
    expected = EVERYTHING[name]()([0, 3], tf.zeros((2, T)))
    keras.config.set_floatx(dtype)
    value = tf.function(EVERYTHING[name]())(tf.constant([0, 3]), tf.zeros((2, T)))
    assert float(value) == pytest.approx(float(expected), rel=0.05)


@pytest.mark.parametrize("label", [T, -1, 0.5, np.nan])
@pytest.mark.parametrize("form", ["sparse", "column"])
def test_an_invalid_label_under_xla_leaves_the_other_gradients(rng, label, form):
    values = tf.constant(rng.normal(size=(3, T)))
    labels = tf.constant([1, label, 2], "float64")
    labels = labels[:, tf.newaxis] if form == "column" else labels

    @tf.function(jit_compile=True)
    def entries_and_gradient(labels, values):
        with tf.GradientTape() as tape:
            tape.watch(values)
            entries = at_label(labels, values, name="test")
        return entries, tape.gradient(entries, values)

    entries, gradient = entries_and_gradient(labels, values)
    np.testing.assert_array_equal(entries, [values[0, 1], np.nan, values[2, 2]])
    np.testing.assert_array_equal(gradient, [np.eye(T)[1], np.zeros(T), np.eye(T)[2]])


def from_generator(x, y, spec):
    """Batches of 40 examples whose static shapes are unknown."""

    def batches():
        for rows in np.split(np.arange(len(x)), len(x) // 40):
            yield x[rows], y[rows]

    specs = tf.TensorSpec([None] * (x.ndim - 1) + [x.shape[-1]]), tf.TensorSpec(spec, "int64")
    dataset = tf.data.Dataset.from_generator(batches, output_signature=specs)
    return dataset.apply(tf.data.experimental.assert_cardinality(len(x) // 40))


def model_with_loss(name, input_shape, jit_compile):
    start = {"kernel_initializer": keras.initializers.GlorotUniform(seed=1)}
    head = partial(tf_dropmax.DropMaxHead, seed=1)
    layer = head if name == "DropMaxLoss" else keras.layers.Dense
    model = keras.Sequential([keras.Input(input_shape), layer(T, **start)])
    model.compile("sgd", LOSSES[name](), jit_compile=jit_compile)
    return model


def train_and_evaluate(model, *data):
    (loss,) = model.fit(*data, batch_size=40, shuffle=False, verbose=0).history["loss"]
    return loss, model.evaluate(*data, batch_size=40, verbose=0)


@pytest.mark.parametrize(
    ("spec", "jit_compile"),
    [
        ((None,), False),
        ((None, 1), False),
        ((None, None), False),
        pytest.param((None, None), True, marks=pytest.mark.long),
        ((None, None, None), False),
        pytest.param((None, None, None), True, marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", LOSSES)
def test_training_from_a_generator_equals_training_from_arrays(blobs, spec, name, jit_compile):
    x, y = blobs
    if len(spec) == 3:
        x, y = x.reshape(80, 2, 6), y.reshape(80, 2)
    if spec == (None, 1):
        y = y[..., np.newaxis]
    elif spec[-1] is None and len(spec) > 1:
        y = np.eye(T, dtype="int64")[y]
    input_shape = (None,) * (x.ndim - 2) + (6,)
    models = [model_with_loss(name, input_shape, jit_compile) for _ in range(2)]
    expected = train_and_evaluate(models[0], x, y)
    assert train_and_evaluate(models[1], from_generator(x, y, spec)) == pytest.approx(expected)
