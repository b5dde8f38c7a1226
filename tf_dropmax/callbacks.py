"""Choosing the test-time mode of the heads in a model, and callbacks that do."""

import contextlib

import keras

from tf_dropmax.checks import check_one_of, check_positive_int
from tf_dropmax.head import PREDICT_MODES, DropMaxHead


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
