"""The mode of a head: an attribute that every compiled model around the head follows."""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import MODES, by_functional, classifier, count_traces, mean_nll

from tf_dropmax import (
    DropMaxHead,
    DropMaxLoss,
    DropMaxPredict,
    predict_mode,
    set_predict_mode,
)


@pytest.fixture
def x(rng):
    return rng.normal(size=(40, 6)).astype("float32")


def predictions(model, x):
    """The same numbers by every way that Keras has."""
    y, log_p = np.arange(len(x)) % 4, model(x).numpy()
    for found in (model.predict(x, verbose=0), model.predict_on_batch(x)):
        np.testing.assert_allclose(found, log_p, atol=1e-5)
    for found in (model.evaluate(x, y, verbose=0), model.test_on_batch(x, y)):
        assert found == pytest.approx(mean_nll(log_p, y), rel=1e-4)
    return log_p


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        *(({}, given) for given in ("outer", "inner", "head")),
        ({"run_eagerly": True}, "outer"),
        pytest.param({"jit_compile": True}, "outer", marks=pytest.mark.long),
        pytest.param({"steps_per_execution": 2}, "outer", marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_change_reaches_the_model_what_is_in_it_and_what_is_around_it(x, settings, given):
    inner = classifier()
    outer = keras.Sequential([keras.Input((6,)), inner])
    for model in (outer, inner):
        model.compile("adam", DropMaxLoss(), **settings)
    expected = by_functional(inner, x)

    def check(mode):
        for model in (inner, outer):
            np.testing.assert_allclose(predictions(model, x), expected[mode], atol=1e-5)

    model = {"outer": outer, "inner": inner, "head": inner.layers[-1]}[given]
    with predict_mode(model, "softmax"):  # Nothing has been traced yet.
        check("softmax")
    check("expected")
    with predict_mode(model, "exact") as same:
        assert same is model
        check("exact")
    check("expected")
    for mode in ("exact", "softmax", "expected"):
        if given == "head":
            model.predict_mode = mode
        else:
            set_predict_mode(model, mode)
        check(mode)


def test_nested_contexts_and_exceptions(x):
    model = classifier()
    head, expected = model.layers[-1], by_functional(model, x)
    with predict_mode(model, "softmax"):
        with predict_mode(model, "sampled", samples=7):
            assert (head.predict_mode, head.predict_samples) == ("sampled", 7)
            np.testing.assert_allclose(np.exp(model.predict(x, verbose=0)).sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(model.predict(x, verbose=0), expected["softmax"], atol=1e-5)
        with pytest.raises(ValueError, match="incompatible"), predict_mode(model, "exact"):
            model.predict(x[:, :5], verbose=0)
        np.testing.assert_allclose(model.predict(x, verbose=0), expected["softmax"], atol=1e-5)
    assert (head.predict_mode, head.predict_samples) == ("expected", 30)
    np.testing.assert_allclose(model.predict(x, verbose=0), expected["expected"], atol=1e-5)


@pytest.mark.slow
def test_samples_reach_the_graph(x):
    """The standard deviation of a mean of 25 masks is a fifth of that of one mask."""
    model, repeated = classifier(), np.tile(x, (60, 1))

    def spread(samples):
        with predict_mode(model, "sampled", samples):
            p = np.exp(model.predict(repeated, batch_size=len(repeated), verbose=0))
        return np.std(np.split(p, 60), axis=0).mean()

    assert spread(1) / spread(25) == pytest.approx(5, rel=0.15)


def test_heads_may_have_modes_of_their_own(x):
    first, second = classifier(name="first"), classifier(name="second", predict_mode="softmax")
    inputs = keras.Input((6,))
    model = keras.Model(inputs, [first(inputs), second(inputs)])
    by_first, by_second = by_functional(first, x), by_functional(second, x)

    def check(one, other):
        expected = by_first[one], by_second[other]
        for found, log_p in zip(model.predict(x, verbose=0), expected, strict=True):
            np.testing.assert_allclose(found, log_p, atol=1e-5)

    check("expected", "softmax")
    with predict_mode(model, "exact"):
        check("exact", "exact")
    check("expected", "softmax")
    set_predict_mode(second, "expected")
    check("expected", "expected")
    with predict_mode(first, "softmax"):
        check("softmax", "expected")
    check("expected", "expected")


def test_a_model_can_be_collected(x):
    model = classifier()
    with predict_mode(model, "exact"):
        model.predict(x, verbose=0)
    head, gone = model.layers[-1], weakref.ref(model)
    del model
    keras.backend.clear_session()
    gc.collect()
    assert gone() is None  # although its head is still in use
    set_predict_mode(head, "softmax")
    assert head.predict_mode == "softmax"


def test_functions_of_an_earlier_compilation_do_not_come_back(x):
    model, y = classifier(), np.zeros(40, int)
    model.compile("sgd", DropMaxLoss())
    expected = by_functional(model, x)

    def check(factor):
        for mode in ("exact", "softmax"):
            nll = factor * mean_nll(expected[mode], y)
            by_callback = model.evaluate(x, y, 40, verbose=0, callbacks=[DropMaxPredict(mode)])
            assert by_callback == pytest.approx(nll, rel=1e-4)
            with predict_mode(model, mode):
                assert model.evaluate(x, y, 40, verbose=0) == pytest.approx(nll, rel=1e-4)

    check(1)  # Before the mode of the model itself was traced,
    model.compile("sgd", DropMaxLoss(reduction="sum"))
    check(40)
    model.evaluate(x, y, verbose=0)  # and after.
    model.compile("sgd", DropMaxLoss())
    check(1)
    with predict_mode(model, "exact"):
        model.compile("sgd", DropMaxLoss(reduction="sum"))
    check(40)
    model.predict(x, verbose=0, callbacks=[DropMaxPredict("exact")])
    model.predict_step = lambda data: 2 * model(data, training=False)
    model.make_predict_function(force=True)
    found = model.predict(x, verbose=0, callbacks=[DropMaxPredict("exact")])
    np.testing.assert_allclose(found, 2 * expected["exact"], atol=1e-5)


def test_a_function_of_the_user_keeps_the_mode_it_was_traced_in(x):
    model = classifier()
    expected = by_functional(model, x)
    function = tf.function(model)
    np.testing.assert_allclose(function(x), expected["expected"], atol=1e-5)
    set_predict_mode(model, "softmax")
    np.testing.assert_allclose(function(x), expected["expected"], atol=1e-5)
    np.testing.assert_allclose(tf.function(model)(x), expected["softmax"], atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_holds_its_mode_and_nothing_else(x, mode):
    model = classifier(predict_mode=mode)
    graph = tf.function(model).get_concrete_function(tf.TensorSpec((None, 6))).graph
    types = {op.type for op in graph.get_operations()}
    library = graph.as_graph_def().library.function
    types |= {node.op for function in library for node in function.node_def}
    assert not types & {"Case", "StatelessCase"}
    assert any("Random" in each for each in types) == (mode == "sampled")
    assert any("While" in each for each in types) == (mode in ("sampled", "exact"))
    captured = {id(handle) for handle in graph.external_captures}
    head = model.layers[-1]
    seeds = [generator.state.value.handle for generator in (head._predict_seeds, head._train_seeds)]
    assert [id(seed) in captured for seed in seeds] == [mode == "sampled", False]
    retain = [weight.value.handle for weight in head.branches["retain"].weights]
    assert all((id(each) in captured) == (mode != "softmax") for each in retain)


def test_no_samples_keep_those_of_the_head():
    model = classifier(predict_samples=100)
    head = model.layers[-1]
    set_predict_mode(model, "sampled")
    assert head.predict_samples == 100
    with predict_mode(model, "exact"):
        assert head.predict_samples == 100
    set_predict_mode(model, "sampled", samples=7)
    assert head.predict_samples == 7


def test_the_last_numbers_of_samples_are_not_traced_again(x, monkeypatch):
    model = classifier()
    for samples in (1, 2, 3):
        with predict_mode(model, "sampled", samples):
            model.predict(x, verbose=0)
    traces = count_traces(model, monkeypatch)
    for samples in (3, 1, 2):
        set_predict_mode(model, "sampled", samples)
        model.predict(x, verbose=0)
    assert not traces


@pytest.mark.slow
def test_validation_in_a_mode_traces_the_training_step_once(x, monkeypatch):
    model = classifier({})
    y, traces = np.zeros(40), count_traces(model, monkeypatch)
    fit = {"verbose": 0, "validation_data": (x, y), "callbacks": [DropMaxPredict("exact")]}
    model.fit(x, y, **fit)
    before = len(traces)
    model.fit(x, y, **fit)
    with predict_mode(model, "softmax"):
        model.fit(x, y, verbose=0)
    assert len(traces) == before


def enter(*arguments):
    return predict_mode(*arguments).__enter__()


@pytest.mark.parametrize("change", [set_predict_mode, enter, DropMaxPredict])
def test_what_is_no_mode_is_refused_at_once(change):
    model = classifier()
    models = [] if change is DropMaxPredict else [model]
    for mode in ("mean", None, ["exact"]):
        with pytest.raises(ValueError, match=r"^`mode` must be one of.*Received: mode="):
            change(*models, mode)
    for samples in (0, 1.5):
        with pytest.raises(ValueError, match=r"^`samples` must be.*Received: samples="):
            change(*models, "sampled", samples)
    head = model.layers[-1]
    for name, value in (("predict_mode", "mean"), ("predict_samples", 0)):
        with pytest.raises(ValueError, match=rf"^`{name}` must be.*Received: {name}="):
            setattr(head, name, value)
    assert (head.predict_mode, head.predict_samples) == ("expected", 30)


@pytest.mark.parametrize("change", [set_predict_mode, enter])
def test_what_has_no_head_is_refused_at_once(change):
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="plain")
    with pytest.raises(ValueError, match=r"at least one DropMaxHead.*'plain'"):
        change(plain, "exact")
    with pytest.raises(ValueError, match="Keras model or layer"):
        change("model", "exact")


class Around(keras.Model):
    """A model whose steps call an inner model by themselves."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, x, training=False):
        return self.inner(x, training=training)

    def train_step(self, data):
        return {"mean": tf.reduce_mean(self(data[0], training=False)[:, 0])}

    def predict_step(self, data):
        return self.inner(data, training=False)

    def test_step(self, data):
        return {"mean": tf.reduce_mean(self.predict_step(data[0])[:, 0])}


def test_steps_of_the_users_own_follow(x):
    """The graph of a training step may hold a prediction, too."""
    inner = classifier()
    model, expected, y = Around(inner), by_functional(inner, x), np.zeros(40)
    model.compile("sgd", DropMaxLoss())

    def check(mode):
        np.testing.assert_allclose(model.predict(x, verbose=0), expected[mode], atol=1e-5)
        trained = model.fit(x, y, batch_size=40, verbose=0).history["mean"][0]
        tested = model.evaluate(x, y, batch_size=40, verbose=0, return_dict=True)["mean"]
        for found in (trained, tested):
            assert float(found) == pytest.approx(expected[mode][:, 0].mean(), rel=1e-5)

    check("expected")
    for given in (model, inner, inner.layers[-1]):
        set_predict_mode(given, "softmax")
        check("softmax")
        with predict_mode(given, "exact"):
            check("exact")
        set_predict_mode(given, "expected")
        check("expected")


def test_a_head_that_keras_does_not_track_follows(x):
    """By the step of another model, in a closure, and in an object that is no layer."""

    class Delegating(keras.Model):
        def predict_step(self, data):
            return inner.predict_step(data)

    class ByItsName(keras.Model):
        def predict(self, x):  # not that of Keras
            return inner(x)

    class Calling(keras.Model):
        def predict_step(self, data):
            return ByItsName().predict(data)

    class Untracked(keras.Model):
        def call(self, x):
            return head(hidden(x))

    inner = classifier()
    expected, (hidden, head) = by_functional(inner, x), inner.layers
    by_closure = keras.layers.Lambda(lambda h: head(h), output_shape=(4,))
    closed = keras.Sequential([keras.Input((6,)), hidden, by_closure])
    for model in (Delegating(), Calling(), closed, Untracked()):
        for mode in ("expected", "exact", "softmax", "exact", "expected"):
            set_predict_mode(head, mode)
            np.testing.assert_allclose(model.predict(x, verbose=0), expected[mode], atol=1e-5)
            with predict_mode(head, "softmax"):
                found = model.predict(x, verbose=0)
            np.testing.assert_allclose(found, expected["softmax"], atol=1e-5)


def test_a_callback_that_predicts_does_not_change_the_training(x, monkeypatch):
    """It uses another model with the same head."""
    model = classifier({})
    part, traces, counts = keras.Sequential(model.layers), count_traces(model, monkeypatch), []

    def predict(epoch, logs):
        with predict_mode(part, "exact"):
            part.predict(x, verbose=0)
        counts.append(len(traces))

    callback = keras.callbacks.LambdaCallback(on_epoch_end=predict)
    model.fit(x, np.zeros(40), epochs=3, verbose=0, callbacks=[callback])
    assert counts == 3 * counts[:1]


def living_graphs():
    gc.collect()
    return sum(isinstance(each, tf.__internal__.FuncGraph) for each in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"jit_compile": True}, marks=pytest.mark.long)], ids=str
)
def test_a_mode_is_traced_once_and_300_changes_leak_nothing(x, settings, monkeypatch):
    model, y = classifier(settings), np.zeros(40)
    traces = count_traces(model, monkeypatch)

    def use(mode):
        by_callback = {"verbose": 0, "callbacks": [DropMaxPredict(mode, samples=3)]}
        model.predict(x, **by_callback)
        model.evaluate(x, y, **by_callback)
        with predict_mode(model, mode, samples=3):
            model.predict(x, verbose=0)
            model.evaluate(x, y, verbose=0)

    for mode in MODES:
        use(mode)
    model.predict(x, verbose=0)
    before, held = len(traces), living_graphs()
    assert before > 0
    for index in range(8):
        use(MODES[index % 4])
        set_predict_mode(model, MODES[index % 3])
    for index in range(300):
        with predict_mode(model, MODES[index % 4], samples=3):
            pass
    assert len(traces) == before
    assert living_graphs() == held


@pytest.mark.slow
@pytest.mark.parametrize("posterior", ["prior", pytest.param("label", marks=pytest.mark.long)])
@pytest.mark.parametrize("mode", ["expected", pytest.param("softmax", marks=pytest.mark.long)])
def test_no_more_graphs_stay_than_with_dense(x, mode, posterior):
    """Keras itself keeps some at every `compile`."""

    def growth(head, loss):
        model = keras.Sequential([keras.Input((6,)), head])
        held = []
        for _ in range(4):
            model.compile("sgd", loss)
            model.fit(x, np.zeros(40), verbose=0)
            model.predict(x, verbose=0)
            held.append(living_graphs())
        return held[3] - held[2]

    ours = growth(DropMaxHead(4, predict_mode=mode, posterior=posterior), DropMaxLoss())
    assert ours <= growth(keras.layers.Dense(4), "sparse_categorical_crossentropy")


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        "expected",
        "softmax",
        *(pytest.param(m, marks=pytest.mark.long) for m in ("exact", "sampled")),
    ],
)
def test_derivatives_of_saved_functions_and_of_single_examples(x, mode, tmp_path):
    """The functions are those of `export` and of a `tf.function`."""
    model = classifier(predict_mode=mode)
    x = tf.constant(x[:5])
    module = tf.Module()
    module.call = tf.function(model, input_signature=[tf.TensorSpec((None, 6))])
    module.model = model
    tf.saved_model.save(module, tmp_path / "module")
    model.export(tmp_path / "exported", verbose=False)
    module, exported = (tf.saved_model.load(tmp_path / name) for name in ("module", "exported"))

    def jacobian(function, x, pfor):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            log_p = function(x)
        np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, atol=1e-5)
        return tape.batch_jacobian(log_p, x, experimental_use_pfor=pfor).numpy()

    def gradient(row):
        with tf.GradientTape() as tape:
            tape.watch(row)
            log_p = model(row[tf.newaxis])[0, 2]
        return tape.gradient(log_p, row)

    expected = jacobian(model, x, False)
    assert np.abs(expected).max() > 0.1
    if mode in ("expected", "softmax"):
        np.testing.assert_allclose(tf.vectorized_map(gradient, x), expected[:, 2], atol=1e-5)
    for function, pfor in [(module.call, True), (exported.serve, True), (exported.serve, False)]:
        found = jacobian(function, x, pfor)
        if mode != "sampled":  # Every call draws other masks.
            np.testing.assert_allclose(found, expected, atol=1e-5)
