"""Temperature scaling: one number corrects underconfident or overconfident probabilities.

The number is fitted on held-out data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax.checks import check_examples, check_positive_int
from tf_dropmax.labels import are_sparse, at_label, label_weights
from tf_dropmax.modes import heads_of, set_predict_temperature

_LARGEST = 100.0  # Temperatures are searched from 1 / 100 to 100.


def calibrate(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    batch_size: int = 256,
) -> float:
    """Fits the temperature of the log-probabilities in the current mode of a model.

    The temperature minimises the negative log-likelihood of the labels. From then on, predictions,
    evaluations and saved and exported models use it. Training does not. Every mode has its own
    temperature. To fit that of another mode, call this function inside `predict_mode`. The
    predicted classes stay the same, except by rounding if two classes have almost the same
    probability. On the given predictions, the likelihood never gets worse. To undo the calibration,
    call `set_predict_temperature(model, 1.0)`.

    This function does not use Keras masks or the `ignore_class` of the loss. Give the positions
    that they leave out the `sample_weight` 0. The labels of these positions are then ignored.

    Use data that the model was not trained on and that you do not test on. Temperature scaling is
    by Guo et al., On Calibration of Modern Neural Networks, ICML 2017. This function needs scipy:
    `pip install 'tf_dropmax[calibration]'`.

    Args:
        model: A `keras.Model` with one `DropMaxHead` and one output, the log-probabilities of the
            head.
        x: Inputs as for `model.evaluate`: an array or tensor or a structure of them; or a
            finite `tf.data.Dataset`, `keras.utils.PyDataset` or generator of batches `(x, y)` or
            `(x, y, sample_weight)`.
        y: Labels of the arrays, as for `DropMaxLoss`: sparse, one-hot or soft. It must be `None`
            if `x` has the labels. Defaults to `None`.
        sample_weight: `None`, or weights of the examples or positions. Defaults to `None`.
        batch_size: Positive int, number of examples of an array that are predicted at a time.
            Defaults to 256.

    Returns:
        Float, the best temperature between 0.01 and 100; or 1.0 or the present temperature, if
        none of those is better.

    Raises:
        ValueError: If `model` is not a model with exactly one head and one output, or the output
            is not log-probabilities; if the data are not as above; if there are no examples, or
            all labels are the same class; if a log-probability, label or weight is not finite; or
            if a label or weight is negative. The model is then unchanged.
        tf.errors.InvalidArgumentError: If a sparse label is not in [0, T). The model is then
            unchanged.
        ImportError: If scipy is not installed.

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
    if len(heads) != 1:
        raise ValueError(f"Expected a model with one DropMaxHead. Received: {len(heads)} heads")
    if not isinstance(model, keras.Model):
        raise ValueError(f"Expected a keras.Model. Received: a layer, {model.name!r}")
    _scipy()  # Before the predictions, which may take long.
    batches = _predicted(model, heads[0].units, _batches(x, y, sample_weight, batch_size))
    # The predictions have the present temperature already.
    temperature = _fitted(list(batches), heads[0].predict_temperature)
    set_predict_temperature(model, temperature)
    return temperature


def best_temperature(log_probabilities: Any, labels: Any, weights: Any = None) -> float:
    """The temperature between 0.01 and 100 with the smallest negative log-likelihood.

    Args:
        log_probabilities: Array of log-probabilities or logits, shape `(N, T)`.
        labels: Array, shape `(N,)`, `(N, 1)` or `(N, T)`, as for `DropMaxLoss`.
        weights: `None` or array, shape `(N,)`. Defaults to `None`.

    Returns:
        Float. It is 1.0 if no other temperature is better.

    Raises:
        ValueError: If the labels do not fit; if there are no examples with a positive weight, or
            all labels are the same class; if a value is not finite; or if a label or weight is
            negative.
        tf.errors.InvalidArgumentError: If a sparse label is not a whole number in [0, T).
        ImportError: If scipy is not installed.

    Example:

    >>> from tf_dropmax.calibration import best_temperature
    >>> logits = np.array([[2.0, 0.0]] * 4)
    >>> round(best_temperature(logits, [0, 0, 0, 1]), 2)  # three of four are right
    1.82
    """
    logits = np.asarray(log_probabilities)
    rows = np.ones(len(logits)) if weights is None else np.asarray(weights)
    return _fitted([_batch(logits, _dense(labels, logits.astype("float64")), rows)])


class _Batch(NamedTuple):
    """Predictions of a batch, and the sums over its labels that the likelihood needs.

    Attributes:
        logits: Array, shape `(N, T)`. Log-probabilities are logits too.
        target: Sum of the logits over classes, weighted by the label, shape `(N,)`.
        mass: Sum of the label over classes, shape `(N,)`. It is 1, unless a soft label has
            another sum.
        weights: Weights of the rows, shape `(N,)`.
        seen: Sum of the labels over rows, weighted by `weights`, shape `(T,)`.
    """

    logits: np.ndarray
    target: np.ndarray
    mass: np.ndarray
    weights: np.ndarray
    seen: np.ndarray


def _batch(logits: np.ndarray, dense: np.ndarray, weights: np.ndarray) -> _Batch:
    """A batch, after a check that all values are finite, and labels and weights not negative."""
    weights = weights.astype("float64")
    _check_finite("log-probabilities", logits)
    _check_finite("weights", weights)
    dense = np.where(weights[:, np.newaxis] == 0, 0, dense).astype("float64")
    _check_finite("labels", dense)
    smallest = min(dense.min(initial=0), weights.min(initial=0))
    if smallest < 0:
        raise ValueError(f"Expected labels and weights >= 0. Received: {smallest}")
    target = np.sum(dense * logits, axis=-1)
    return _Batch(logits, target, dense.sum(axis=-1), weights, weights @ dense)


def _fitted(batches: Sequence[_Batch], present: float = 1.0) -> float:
    """The best temperature for predictions that have been divided by `present`."""
    minimize_scalar, logsumexp = _scipy()
    if not sum(batch.weights.sum() for batch in batches) > 0:
        raise ValueError("Expected examples with a positive weight. Received: none")
    seen = np.flatnonzero(sum(batch.seen for batch in batches))
    if len(seen) < 2:
        raise ValueError(f"Expected labels of two classes or more. Received: class {seen} only")

    def loss(log_temperature: float) -> float:
        scale = present * np.exp(-log_temperature)
        total = 0.0
        for logits, target, mass, weights, _ in batches:
            normaliser = logsumexp(scale * logits.astype("float64"), axis=-1)
            total += float(weights @ (mass * normaliser - scale * target))
        return total

    bounds = -np.log(_LARGEST), np.log(_LARGEST)
    options = {"xatol": 1e-8}
    best = float(minimize_scalar(loss, bounds=bounds, method="bounded", options=options).x)
    return min((1.0, present, float(np.exp(best))), key=lambda each: loss(np.log(each)))


def _scipy() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from scipy.optimize import minimize_scalar
        from scipy.special import logsumexp
    except ImportError as error:
        message = "Calibration needs scipy: pip install 'tf_dropmax[calibration]'"
        raise ImportError(message) from error
    return minimize_scalar, logsumexp


def _dense(labels: Any, values: np.ndarray) -> np.ndarray:
    """Labels as rows, after a check that sparse labels are in [0, T)."""
    labels, values = tf.convert_to_tensor(labels), tf.constant(values)
    if are_sparse(labels, values, name="calibrate"):
        at_label(labels, values, name="calibrate")
    return label_weights(labels, values, name="calibrate").numpy()


def _check_finite(what: str, values: np.ndarray) -> None:
    wrong = np.size(values) - np.count_nonzero(np.isfinite(values))
    if wrong:
        raise ValueError(f"Expected finite {what}. Received: {wrong} that are not")


def _batches(x: Any, y: Any, sample_weight: Any, batch_size: int) -> Iterator[Any]:
    """Batches `(x, y, sample_weight)` of arrays or of an iterable of batches."""
    infinite = isinstance(x, tf.data.Dataset) and x.cardinality() == tf.data.INFINITE_CARDINALITY
    if infinite or (isinstance(x, keras.utils.PyDataset) and x.num_batches is None):
        raise ValueError(
            f"Expected a finite number of batches. Received: an infinite {type(x).__name__}"
        )
    if isinstance(x, keras.utils.PyDataset):
        x = map(x.__getitem__, range(x.num_batches))
    of_arrays = hasattr(x, "shape") or isinstance(x, list | tuple | dict)
    if isinstance(x, Iterable) and not of_arrays:
        if y is not None or sample_weight is not None:
            raise ValueError(
                "`y` and `sample_weight` must be `None` if `x` gives batches. "
                f"Received: x of type {type(x).__name__}"
            )
        for batch in x:
            yield keras.utils.unpack_x_y_sample_weight(batch)
        return
    check_positive_int("batch_size", batch_size)
    if y is None:
        raise ValueError(
            "Expected labels `y`, or `x` as a tf.data.Dataset, keras.utils.PyDataset or generator "
            f"of batches (x, y). Received: x of type {type(x).__name__} and no y"
        )
    weights = {} if sample_weight is None else {"sample_weight": sample_weight}
    check_examples(x, y=y, **weights)
    y, sample_weight = (None if each is None else np.asarray(each) for each in (y, sample_weight))
    for start in range(0, len(y), batch_size):
        rows = slice(start, start + batch_size)
        inputs = keras.tree.map_structure(lambda part, rows=rows: part[rows], x)
        yield inputs, y[rows], None if sample_weight is None else sample_weight[rows]


def _predicted(model: keras.Model, units: int, batches: Iterable[Any]) -> Iterator[_Batch]:
    """The predictions of all positions, with what is needed of labels and weights."""
    for x, y, sample_weight in batches:
        examples = len(keras.tree.flatten(x)[0])
        if examples == 0:
            continue
        # Under `tf.distribute`, `predict_on_batch` would give the batch once for every replica.
        log_p = model.predict(x, batch_size=examples, verbose=0)
        if not isinstance(log_p, np.ndarray) or log_p.shape[-1] != units:
            raise ValueError(
                f"Expected a model whose one output has shape (batch, ..., {units}). If the model "
                "has other outputs, calibrate a `keras.Model` of its inputs and the output of the "
                f"head. Received: {keras.tree.map_structure(np.shape, log_p)}"
            )
        total = np.exp(log_p.astype("float64")).sum(axis=-1)
        if (np.abs(total - 1) > 1e-3).any():  # NaN passes and is refused later.
            raise ValueError(
                "Expected a model that returns log-probabilities, of which `exp` sums to 1. "
                f"Received: sums from {total.min():.4g} to {total.max():.4g}"
            )
        if y is None:
            raise ValueError("Expected batches (x, y). Received: a batch without labels")
        y = np.asarray(y)
        weights: np.ndarray = np.asarray(1.0 if sample_weight is None else sample_weight)
        while weights.ndim >= log_p.ndim and weights.shape[-1] == 1:
            weights = weights[..., 0]
        given, positions = np.shape(sample_weight), log_p.shape[:-1]
        weights = weights.reshape(weights.shape + (1,) * (len(positions) - weights.ndim))
        try:
            weights = np.broadcast_to(weights, positions)
        except ValueError as error:
            raise ValueError(
                f"Expected a sample weight for each of {positions[0]} examples, or for each "
                f"position {positions} of the predictions. Received: weights of shape {given}"
            ) from error
        if y.size == weights.size:  # Sparse labels: those without weight may be any number.
            y = np.where(weights.reshape(y.shape) == 0, 0, y)
        dense = _dense(y, log_p).reshape(-1, units)
        yield _batch(log_p.reshape(-1, units), dense, weights.reshape(-1))
