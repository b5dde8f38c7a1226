"""Temperature scaling: one number corrects underconfident or overconfident probabilities.

The number is fitted on held-out data.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax.head.inference import MAX_TEMPERATURE
from tf_dropmax.labels import are_sparse, at_label, joint_weights, label_weights
from tf_dropmax.modes import heads_of


def set_predict_temperature(model: keras.layers.Layer, temperature: float = 1.0) -> None:
    """Sets the temperature of the log-probabilities in the current mode of a model.

    Log-probabilities are divided by the temperature and normalised again. Training does not use it.
    Every mode has a temperature of its own. `calibrate` fits it. The temperatures are a weight of
    the head, `predict_temperatures`, so weights files and checkpoints contain them. Set 1.0 to undo
    a calibration.

    Args:
        model: A `keras.Model` or `keras.layers.Layer` that contains, at any depth, a
            `DropMaxHead`, or is one.
        temperature: Float in [0.01, 100]. Defaults to 1.0.

    Raises:
        ValueError: If `temperature` is not as above, or the model has no `DropMaxHead`. The model
            is then unchanged.

    Example:

    >>> head = tf_dropmax.DropMaxHead(3)
    >>> tf_dropmax.set_predict_temperature(head, 2.0)
    >>> head.predict_temperatures.numpy()  # of "expected", "sampled", "exact" and "softmax"
    array([2., 1., 1., 1.], dtype=float32)
    """
    for head in heads_of(model):
        head.predict_temperature = temperature


def calibrate(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    batch_size: int | None = None,
) -> float:
    """Fits the temperature of the log-probabilities in the current mode of a model.

    The temperature minimises the negative log-likelihood of the labels. From then on, predictions,
    evaluations and saved and exported models use it. Training does not. Every mode has its own
    temperature. To fit that of another mode, call this function inside `predict_mode`. The
    predicted classes stay the same, except by rounding if two classes have almost the same
    probability. On the given data, the likelihood never gets worse. To undo the calibration,
    call `set_predict_temperature(model, 1.0)`.

    This function does not use Keras masks or the `ignore_class` of the loss. Give the positions
    that they leave out the `sample_weight` 0. The labels of these positions are then ignored.

    Use data that the model was not trained on and that you do not test on. Temperature scaling is
    by Guo et al., On Calibration of Modern Neural Networks, ICML 2017.

    Args:
        model: A `keras.Model` with one `DropMaxHead` and one output, the log-probabilities of the
            head.
        x: Data as for `model.evaluate`: arrays or tensors, or a finite `tf.data.Dataset`,
            `keras.utils.PyDataset` or generator of batches `(x, y)` or `(x, y, sample_weight)`.
        y: Labels of the arrays, as for `DropMaxLoss`: sparse, one-hot or soft. It must be `None`
            if `x` has the labels. Defaults to `None`.
        sample_weight: `None`, or weights of the examples or positions of the arrays. Defaults to
            `None`.
        batch_size: `None` or positive int, as for `model.evaluate`. Defaults to `None`.

    Returns:
        Float, the best temperature between 0.01 and 100.

    Raises:
        ValueError: If `model` is not a model with exactly one head and one output, or the output
            is not log-probabilities; if the data are not as above; if no example has a positive
            weight, all labels are the same class, or the model makes no errors on them; if a
            log-probability, label or weight is not finite; or if a label or weight is negative.
            The model is then unchanged.
        tf.errors.InvalidArgumentError: If a sparse label is not in [0, T). The model is then
            unchanged.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), tf_dropmax.DropMaxHead(3, seed=0)])
    >>> x, y = np.random.default_rng(0).normal(size=(60, 4)), np.arange(60) % 3
    >>> model.compile("adam", tf_dropmax.DropMaxLoss())
    >>> before = model.evaluate(x, y, verbose=0)
    >>> temperature = tf_dropmax.calibrate(model, x, y)
    >>> temperature > 0 and model.evaluate(x, y, verbose=0) <= before
    True
    """
    heads = heads_of(model)
    if len(heads) != 1 or not isinstance(model, keras.Model):
        raise ValueError(
            "Expected a keras.Model with one DropMaxHead. Received: "
            f"{model.name!r} of type {type(model).__name__}, which has {len(heads)}"
        )
    of_arrays = y is not None
    if sample_weight is not None and not of_arrays:
        raise ValueError("Expected `sample_weight` beside arrays only: a data set yields its own")
    if getattr(getattr(y, "dtype", None), "kind", None) in ("O", "S", "U"):
        raise ValueError(f"Expected labels that are numbers. Received: y.dtype={y.dtype}")
    with model.distribute_strategy.scope():
        predictor = _WithLabels(model, heads[0].units, of_arrays)
        # XLA has no assertions, and the model may not compile with it.
        predictor.compile(run_eagerly=model.run_eagerly, jit_compile=False)
    data = (x, y) if sample_weight is None else (x, y, sample_weight)
    found = predictor.predict(data if of_arrays else x, batch_size=batch_size, verbose=0)
    log_p, dense, weights = (np.asarray(each, "float64") for each in found)
    temperature = _fitted(log_p, dense, weights, heads[0].predict_temperature)
    sums = np.exp(log_p).sum(axis=-1)
    if not np.allclose(sums, 1, atol=1e-3):
        raise ValueError(
            "Expected a model that returns log-probabilities, of which `exp` sums to 1. "
            f"Received: sums from {sums.min():.4g} to {sums.max():.4g}"
        )
    if temperature < 1.001 / MAX_TEMPERATURE:
        raise ValueError(
            "Expected more data. The model makes no errors on these, or almost none, so the best "
            f"temperature is 0. Received: {len(log_p)} examples"
        )
    set_predict_temperature(model, temperature)
    return temperature


def best_temperature(log_probabilities: Any, labels: Any, weights: Any = None) -> float:
    """The temperature between 0.01 and 100 with the smallest negative log-likelihood.

    Args:
        log_probabilities: Array of log-probabilities or logits, shape `(N, T)`.
        labels: Array, shape `(N,)`, `(N, 1)` or `(N, T)`, as for `DropMaxLoss`.
        weights: `None` or array, shape `(N,)`. Defaults to `None`.

    Returns:
        Float.

    Raises:
        ValueError: If the labels do not fit; if there are no examples with a positive weight, or
            all labels are the same class; if a value is not finite; or if a label or weight is
            negative.
        tf.errors.InvalidArgumentError: If a sparse label is not a whole number in [0, T).

    Example:

    >>> from tf_dropmax.calibration import best_temperature
    >>> logits = np.array([[2.0, 0.0]] * 4)
    >>> round(best_temperature(logits, [0, 0, 0, 1]), 2)  # three of four are right
    1.82
    """
    logits = tf.convert_to_tensor(log_probabilities)
    weights = tf.ones(logits.shape[:-1]) if weights is None else tf.convert_to_tensor(weights)
    parts = (logits, _dense(tf.convert_to_tensor(labels), logits, weights), weights)
    return _fitted(*(np.asarray(part, "float64") for part in parts))


class _WithLabels(keras.Model):
    """Predicts log-probabilities, labels as rows, and weights. Keras adapts the data."""

    def __init__(self, model: keras.Model, units: int, of_arrays: bool):
        super().__init__()
        self.inner, self.units, self.of_arrays = model, units, of_arrays

    def predict_step(self, data: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        # `predict` takes labels in a batch of a data set, but has no argument for those of arrays.
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
            data[0] if self.of_arrays else data
        )
        log_p = self.inner(x, training=False)
        if not tf.is_tensor(log_p) or log_p.shape[-1] != self.units:
            raise ValueError(
                f"Expected a model whose one output has shape (batch, ..., {self.units}). If the "
                "model has other outputs, calibrate a `keras.Model` of its inputs and the output "
                f"of the head. Received: {log_p!r}"
            )
        if y is None:
            raise ValueError("Expected labels: `y`, or batches (x, y). Received: none")
        weights = joint_weights(log_p[..., 0], sample_weight)
        return log_p, _dense(tf.convert_to_tensor(y), log_p, weights), weights


def _dense(labels: tf.Tensor, log_p: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Labels as rows, after a check of sparse labels. Labels without weight may be any number."""
    sparse = are_sparse(labels, log_p, name="calibrate")
    used = tf.reshape(weights != 0, tf.shape(labels)) if sparse else (weights != 0)[..., tf.newaxis]
    labels = tf.where(used, labels, tf.zeros_like(labels))
    if sparse:
        with tf.control_dependencies([at_label(labels, log_p, name="calibrate")]):
            labels = tf.identity(labels)
    return label_weights(labels, log_p, name="calibrate")


def _fitted(log_p, dense, weights, present=1.0):
    """The best temperature for predictions that have been divided by `present`.

    The negative log-likelihood is convex in the inverse of the temperature. A bisection finds where
    its slope is 0.
    """
    for what, values in {"log-probabilities": log_p, "labels": dense, "weights": weights}.items():
        if not np.isfinite(values).all() or (what != "log-probabilities" and (values < 0).any()):
            raise ValueError(
                f"Expected finite log-probabilities, and finite labels and weights >= 0. "
                f"Received: {what} from {values.min()} to {values.max()}"
            )
    seen = np.flatnonzero(np.tensordot(weights, dense, weights.ndim)).tolist()
    if len(seen) < 2:
        raise ValueError(f"Expected positive weights of 2 classes or more. Received: labels {seen}")
    target = np.sum(weights * np.sum(dense * log_p, axis=-1))
    mass = weights * dense.sum(axis=-1)

    def slope(inverse):
        scaled = inverse * log_p
        p = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
        mean = np.sum(p * log_p, axis=-1) / p.sum(axis=-1)
        return np.sum(mass * mean) - target

    low, high = np.log(1 / MAX_TEMPERATURE / present), np.log(MAX_TEMPERATURE / present)
    for _ in range(60):
        middle = (low + high) / 2
        if slope(np.exp(-middle)) > 0:  # The inverse is too large, the temperature too small.
            low = middle
        else:
            high = middle
    return float(np.clip(present * np.exp((low + high) / 2), 1 / MAX_TEMPERATURE, MAX_TEMPERATURE))
