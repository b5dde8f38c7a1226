"""What is done to the heads of a model from outside: choosing the test-time mode, watching and annealing the training."""

import contextlib

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax.checks import check_one_of, check_positive_int
from tf_dropmax.head import PREDICT_MODES, DropMaxHead
from tf_dropmax.metrics import retain_statistics


@contextlib.contextmanager
def predict_mode(model, mode, samples=30):
    """Context manager: inside, every `DropMaxHead` of `model` predicts in the given mode.

    Compiled functions follow without retracing. On leaving, also by an exception, every head is back in the mode it had.
    The mode belongs to the model: threads that share a model must not change it while others predict.

    Args:
        model: A `keras.Model` or `keras.layers.Layer` that contains, at any depth, a `DropMaxHead`, or is one.
        mode: `"expected"`, `"sampled"`, `"exact"` or `"softmax"`, see `DropMaxHead`.
        samples: Positive int, number of masks in mode `"sampled"`. Defaults to 30.

    Yields:
        `model`.

    Raises:
        ValueError: if `mode` or `samples` is not as above, or the model has no `DropMaxHead`.

    Example:

    >>> head = tf_dropmax.DropMaxHead(3)
    >>> with tf_dropmax.predict_mode(head, "exact"):
    ...     log_probabilities = head(np.ones((1, 4), "float32"))
    >>> head.predict_mode
    'expected'
    """
    heads = _heads(model)
    before = [head._get_predict_setting() for head in heads]
    try:
        for head in heads:
            head._set_predict_setting(mode, samples)
        yield model
    finally:
        for head, setting in zip(heads, before, strict=True):
            head._set_predict_setting(*setting)


def _heads(model):
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(f"Expected a Keras model or layer. Received: {model!r} of type {type(model).__name__}")
    heads = [layer for layer in model._flatten_layers() if isinstance(layer, DropMaxHead)]
    if not heads:
        raise ValueError(f"Expected a model with at least one DropMaxHead. Received: {model.name!r}, which has none")
    return heads


class DropMaxPredict(keras.callbacks.Callback):
    """Callback that chooses the test-time mode for `predict`, `evaluate` and the validation inside `fit`.

    The mode is in force while a prediction or evaluation step runs and at no other time: training steps never see it, and
    an exception, wherever it is raised, leaves the model in the mode it had. Nothing is traced anew. The mode belongs to the
    model: threads that share a model must not use this callback while others predict.

    Args:
        mode: `"expected"`, `"sampled"`, `"exact"` or `"softmax"`, see `DropMaxHead`.
        samples: Positive int, number of masks in mode `"sampled"`. Defaults to 30.

    Raises:
        ValueError: if `mode` or `samples` is not as above; when used, if the model has no `DropMaxHead`, or if two of these
            callbacks are given to one call.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), tf_dropmax.DropMaxHead(3)])
    >>> x = np.ones((2, 4), "float32")
    >>> exact = model.predict(x, callbacks=[tf_dropmax.DropMaxPredict("exact")], verbose=0)
    >>> exact.shape
    (2, 3)
    """

    def __init__(self, mode, samples=30):
        super().__init__()
        self.mode = check_one_of("mode", mode, PREDICT_MODES)
        self.samples = check_positive_int("samples", samples)
        self._leave = self._make = None

    def on_train_begin(self, logs=None):
        _heads(self.model)  # a model without a head is an error now, not after the first epoch

    # Keras calls `on_..._end` only if nothing went wrong. So the mode is set around each single step, where a `finally` can
    # take it back; and the wrapper that does so is taken off at the end or, if the end never came, by
    # `make_..._function`, with which Keras begins every call of `predict` and `evaluate`. Such a call may also come from
    # another callback, in the midst of this one: then the next batch puts the wrapper on again.

    def on_predict_begin(self, logs=None):
        self._enter("predict")

    def on_predict_batch_begin(self, batch, logs=None):
        self._enter("predict")

    def on_predict_end(self, logs=None):
        self._leave()

    def on_test_begin(self, logs=None):
        self._enter("test")

    def on_test_batch_begin(self, batch, logs=None):
        self._enter("test")

    def on_test_end(self, logs=None):
        self._leave()

    def _enter(self, kind):
        model, step_name, make_name = self.model, f"{kind}_function", f"make_{kind}_function"
        present = vars(model).get(make_name)
        if present is not None:
            if present is self._make:
                return
            raise ValueError(f"Expected one DropMaxPredict in a call. Received: another one, with mode={self.mode!r}")
        _heads(model)
        step, make = getattr(model, step_name), getattr(model, make_name)

        def step_in_mode(*args):
            with predict_mode(model, self.mode, self.samples):
                return step(*args)

        def leave():
            if vars(model).get(make_name) is make_after_leaving:
                delattr(model, make_name)
                if getattr(model, step_name) is step_in_mode:  # not, if the model was compiled since
                    setattr(model, step_name, step)

        def make_after_leaving(*args, **kwargs):
            leave()
            return make(*args, **kwargs)

        setattr(model, step_name, step_in_mode)
        setattr(model, make_name, make_after_leaving)
        self._leave, self._make = leave, make_after_leaving


class DropMaxMonitor(keras.callbacks.Callback):
    """Callback that anneals the head's settings, and logs what the head has learned about its masks.

    After every epoch it adds to the logs, from where they reach `history` and every callback that stands after this one
    (`TensorBoard`, `CSVLogger`, `ModelCheckpoint`, ...), means over the given examples:

        retain_target      retain probability of the label's class
        retain_others      retain probability of the other classes
        retained_classes   expected number of classes that a mask retains, `sum_t rho_t`
        mask_entropy       entropy of a mask, in nats, at most log 2

    and `entropy_weight` and `temperature`, those that are annealed, as they were in that epoch. If the model has several
    heads, each is watched, the names begin with `HEAD_`, its name, and all are annealed alike.

    Args:
        x: Inputs of the model as for `predict`, a tensor, an array or a structure of them, of `(examples, ...)`; or `None`:
            nothing is watched. Take validation data. Positions that a Keras mask leaves out do not count. Defaults to `None`.
        y: Int labels, `(examples, ...)` or `(examples, ..., 1)`; needed with `x`. Defaults to `None`.
        entropy_weight: `None` or a function from the epoch, an int from 0, to the weight to train it with, a non-negative
            float. Defaults to `None`.
        temperature: `None` or a function from the epoch to the temperature to train it with, a positive float. Defaults to
            `None`.
        batch_size: Positive int, examples that are watched at a time. Defaults to 256.

    Raises:
        ValueError: if there is nothing to do, `x` and `y` do not fit together, or an argument is not as above; in training, if
            the model has no `DropMaxHead`, does not call it on `x`, or a function gives a value that is not as above.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), tf_dropmax.DropMaxHead(3)])
    >>> model.compile("adam", tf_dropmax.DropMaxLoss())
    >>> x, y = np.random.default_rng(0).normal(size=(30, 4)).astype("float32"), np.arange(30) % 3
    >>> monitor = tf_dropmax.DropMaxMonitor(x, y, entropy_weight=lambda epoch: 0.5**epoch)
    >>> history = model.fit(x, y, epochs=3, callbacks=[monitor], verbose=0).history
    >>> history["entropy_weight"]
    [1.0, 0.5, 0.25]
    >>> len(history["retain_target"])
    3
    """

    def __init__(self, x=None, y=None, entropy_weight=None, temperature=None, batch_size=256):
        super().__init__()
        self.schedules = {"entropy_weight": entropy_weight, "temperature": temperature}
        for name, schedule in self.schedules.items():
            if schedule is not None and not callable(schedule):
                raise ValueError(f"`{name}` must be a function of the epoch or `None`. Received: {name}={schedule!r}")
        self.batch_size = check_positive_int("batch_size", batch_size)
        self.x, self.y = x, None if y is None else np.asarray(y)
        if (x is None) != (y is None) or (x is None and entropy_weight is None and temperature is None):
            raise ValueError(
                "Expected `x` with `y`, a schedule, or both. Received: "
                + ", ".join(
                    f"{name}={'None' if value is None else '...'}" for name, value in {"x": x, "y": y, **self.schedules}.items()
                )
            )
        if x is not None:
            sizes = {len(part) for part in keras.tree.flatten(x)}
            if self.y.dtype.kind not in "iu" or self.y.ndim == 0 or sizes != {len(self.y)} or not len(self.y):
                raise ValueError(
                    "`y` must be whole numbers, one for each example of `x`. "
                    f"Received: {self.y.dtype} of shape {self.y.shape}, x with {sorted(sizes)} examples"
                )

    def on_train_begin(self, logs=None):
        self._heads = _heads(self.model)
        classes = min(head.units for head in self._heads)
        if self.x is not None and not 0 <= self.y.min() <= self.y.max() < classes:
            raise ValueError(f"`y` must be in [0, {classes}). Received: values from {self.y.min()} to {self.y.max()}")
        self._statistics = tf.function(self._statistics_of)

    def on_epoch_begin(self, epoch, logs=None):
        for name, schedule in self._schedules():
            for head in self._heads:
                setattr(head, name, schedule(epoch))

    def on_epoch_end(self, epoch, logs=None):
        if self.x is not None:
            for head, values in zip(self._heads, self._means(), strict=True):
                prefix = "" if len(self._heads) == 1 else f"{head.name}_"
                logs.update({prefix + name: float(value) for name, value in zip(_STATISTICS, values, strict=True)})
        logs.update({name: getattr(self._heads[0], name) for name, _ in self._schedules()})

    def _schedules(self):
        return [(name, schedule) for name, schedule in self.schedules.items() if schedule is not None]

    def _means(self):
        """Statistics of every head, averaged over the examples."""
        total = 0.0
        for start in range(0, len(self.y), self.batch_size):
            rows = slice(start, start + self.batch_size)
            y = self.y[rows]
            x = keras.tree.map_structure(lambda part, rows=rows: tf.convert_to_tensor(part[rows]), self.x)
            total += self._statistics(x, tf.constant(y, tf.int32)).numpy()
        return total[:, 1:] / total[:, :1]

    def _statistics_of(self, x, y):
        """Sums over a batch, after their weight, shape `(heads, 1 + statistics)`."""
        with contextlib.ExitStack() as stack:
            inputs = [stack.enter_context(_listening(head)) for head in self._heads]
            self.model(x, training=False)
        return tf.stack([_mask_statistics(head, heard, y) for head, heard in zip(self._heads, inputs, strict=True)])


_STATISTICS = ("retain_target", "retain_others", "retained_classes", "mask_entropy")


def _mask_statistics(head, inputs, labels):
    if len(inputs) != 1:
        raise ValueError(f"Expected a model that calls its head {head.name!r} once. Received: {len(inputs)} calls of it")
    ((features, mask),) = inputs
    rho = tf.cast(head.retain_probabilities(features), tf.float64)
    entropy = tf.reduce_mean(-tf.math.xlogy(rho, rho) - tf.math.xlog1py(1 - rho, -rho), axis=-1)
    weight = tf.ones_like(entropy) if mask is None else tf.cast(mask, tf.float64)
    return [tf.reduce_sum(weight * values) for values in (1.0, *retain_statistics(labels, rho), entropy)]


@contextlib.contextmanager
def _listening(head):
    """Inside, what the head is called on for its classes, and its mask, is appended to the list that this yields."""
    heard, call = [], head.call

    def listen(inputs, training=False, mask=None, *, output="classes"):
        if output == "classes":
            heard.append((inputs, mask))
        return call(inputs, training, mask, output=output)

    head.call = listen
    try:
        yield heard
    finally:
        del head.call
