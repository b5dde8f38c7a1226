"""The mode of a head: an attribute that every compiled model around the head follows."""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import DETERMINISTIC, MODES, by_functional, classifier, count_traces, mean_nll
from packaging.version import Version

from tf_dropmax import (
    DropMaxHead,
    DropMaxLoss,
    DropMaxPredict,
    predict_mode,
    set_predict_mode,
    set_predict_temperature,
)


@pytest.fixture
def x(rng):
    return rng.normal(size=(40, 6)).astype("float32")


def predictions(model, x):
    """The same numbers by every way that Keras has."""
    y = np.arange(len(x)) % 4
    found = {
        "call": model(x).numpy(),
        "predict": model.predict(x, verbose=0),
        "predict_on_batch": model.predict_on_batch(x),
    }
    for name, log_p in found.items():
        np.testing.assert_allclose(log_p, found["call"], atol=1e-5, err_msg=name)
    nll = mean_nll(found["call"], y)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(nll, rel=1e-4)
    assert model.test_on_batch(x, y) == pytest.approx(nll, rel=1e-4)
    return found["predict"]


SETTINGS = [
    {},
    pytest.param({"jit_compile": True}, marks=pytest.mark.long),
    {"run_eagerly": True},
    pytest.param({"steps_per_execution": 2}, marks=pytest.mark.long),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("given", ["outer", "inner", "head"])
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
    for mode in DETERMINISTIC:
        check("expected")
        with predict_mode(model, mode) as same:
            assert same is model
            check(mode)
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
    model = classifier()

    repeated = np.concatenate([x] * 60)

    def spread(samples):
        with predict_mode(model, "sampled", samples):
            p = np.exp(model.predict(repeated, batch_size=len(repeated), verbose=0))
        return np.std(np.split(p, 60), axis=0).mean()

    assert spread(1) / spread(25) == pytest.approx(5, rel=0.15)


def test_errors_name_the_arguments(x):
    model = classifier()
    for change in (set_predict_mode, lambda *of: predict_mode(*of).__enter__()):
        with pytest.raises(ValueError, match=r"^`mode` must be one of.*Received: mode='mean'"):
            change(model, "mean")
        with pytest.raises(ValueError, match=r"^`samples` must be.*Received: samples=0"):
            change(model, "sampled", 0)
    head = model.layers[-1]
    for name, value in (("predict_mode", "mean"), ("predict_samples", 0)):
        with pytest.raises(ValueError, match=rf"^`{name}` must be.*Received: {name}="):
            setattr(head, name, value)
    assert (head.predict_mode, head.predict_samples) == ("expected", 30)


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


def test_a_training_step_that_predicts_follows(x):
    """Its graph holds a prediction, so it depends on the mode."""

    class SelfDistilled(keras.Model):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def call(self, x, training=False):
            return self.inner(x, training=training)

        def train_step(self, data):
            return {"nll": -tf.reduce_mean(self(data[0], training=False)[:, 0])}

    inner = classifier()
    model = SelfDistilled(inner)
    model.compile("sgd", DropMaxLoss())
    expected = by_functional(inner, x)

    def check(mode):
        history = model.fit(x, np.zeros(40), batch_size=40, verbose=0).history
        found = float(history["nll"][0])
        assert found == pytest.approx(-expected[mode][:, 0].mean(), rel=1e-5)

    check("expected")
    for model_or_head in (model, inner, inner.layers[-1]):
        set_predict_mode(model_or_head, "softmax")
        check("softmax")
        with predict_mode(model_or_head, "exact"):
            check("exact")
        set_predict_mode(model_or_head, "expected")
        check("expected")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"jit_compile": True}, marks=pytest.mark.long)], ids=str
)
def test_a_mode_is_traced_once_and_300_changes_leak_nothing(x, settings, monkeypatch):
    model = classifier()
    y = np.zeros(40)
    model.compile("sgd", DropMaxLoss(), **settings)
    expected = by_functional(model, x)
    traces = count_traces(model, monkeypatch)

    def use(mode):
        with predict_mode(model, mode, samples=3):
            found = model.predict(x, verbose=0)
            model.evaluate(x, y, verbose=0)
        by_callback = model.predict(x, verbose=0, callbacks=[DropMaxPredict(mode, samples=3)])
        model.evaluate(x, y, verbose=0, callbacks=[DropMaxPredict(mode, samples=3)])
        if mode != "sampled":
            np.testing.assert_allclose(found, expected[mode], atol=1e-5)
            np.testing.assert_allclose(by_callback, expected[mode], atol=1e-5)

    def graphs():
        gc.collect()
        return sum(isinstance(each, tf.__internal__.FuncGraph) for each in gc.get_objects())

    for mode in MODES:
        use(mode)
    model.predict(x, verbose=0)
    before, held = len(traces), graphs()
    assert before > 0
    for index in range(20):
        use(MODES[index % 4])
        set_predict_mode(model, MODES[index % 3])
    for index in range(300):
        with predict_mode(model, MODES[index % 4], samples=3):
            pass
    assert len(traces) == before
    assert graphs() == held


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
        nll = 40 * mean_nll(expected["exact"], y)
        assert model.evaluate(x, y, 40, verbose=0) == pytest.approx(nll, rel=1e-4)
    check(40)


def test_a_forced_function_does_not_come_back(x):
    model = classifier()
    expected = by_functional(model, x)
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


def jacobian(function, x, **kwargs):
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = function(x)
    return tape.batch_jacobian(y, x, **kwargs).numpy()


class Module(tf.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    @tf.function(input_signature=[tf.TensorSpec((None, 6), tf.float32)])
    def __call__(self, x):
        return self.model(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        "expected",
        "softmax",
        *(pytest.param(m, marks=pytest.mark.long) for m in ("exact", "sampled")),
    ],
)
def test_what_works_for_dense_works_for_the_head(x, mode, tmp_path):
    model = classifier(predict_mode=mode)
    x = tf.constant(x[:5])
    tf.saved_model.save(Module(model), tmp_path / "module")
    module = tf.saved_model.load(tmp_path / "module")
    model.export(tmp_path / "exported", verbose=False)
    artifact = tf.saved_model.load(tmp_path / "exported")
    # TensorFlow 2.17 cannot vectorize `top_k` in a branch that no row takes.
    old = Version(tf.__version__) < Version("2.18")
    vectorized_map = tf.map_fn if old and mode == "exact" else tf.vectorized_map
    mapped = vectorized_map(lambda row: model(row[tf.newaxis])[0], x)
    jacobians = [
        jacobian(function, x, experimental_use_pfor=pfor)
        for function, pfor in [(model, False), (artifact.serve, True), (artifact.serve, False)]
    ]

    def gradient(row):
        with tf.GradientTape() as tape:
            tape.watch(row)
            log_p = model(row[tf.newaxis])[0, 2]
        return tape.gradient(log_p, row)

    gradients = vectorized_map(gradient, x)
    for log_p in (mapped, module(x), artifact.serve(x)):
        np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, atol=1e-5)
    if mode == "sampled":
        assert np.abs(module(x) - module(x)).max() > 1e-3  # It draws new masks at every call.
        return
    expected = by_functional(model, x.numpy())[mode]
    for log_p in (mapped, module(x), artifact.serve(x)):
        np.testing.assert_allclose(log_p, expected, atol=1e-5)
    reference = np.stack([tf.squeeze(jacobian(model, row[tf.newaxis])) for row in x])
    assert np.abs(reference).max() > 0.1
    for each in jacobians:
        np.testing.assert_allclose(each, reference, atol=1e-5)
    np.testing.assert_allclose(gradients, reference[:, 2], atol=1e-5)


def test_a_model_with_steps_of_its_own(x):
    """Its graphs call an inner model. They follow, whoever is given."""

    class Outer(keras.Model):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def call(self, x):
            return self.inner(x)

        def predict_step(self, data):
            return self.inner(data, training=False)

        def test_step(self, data):
            return {"mean": tf.reduce_mean(self.inner(data[0], training=False)[:, 0])}

    class Delegating(Outer):
        def predict_step(self, data):
            return self.inner.predict_step(data)

    inner = classifier()
    outer, expected = Outer(inner), by_functional(inner, x)
    outer.compile()
    delegating = Delegating(inner)
    for mode in ("exact", "softmax", "exact"):
        inner.layers[-1].predict_mode = mode
        np.testing.assert_allclose(delegating.predict(x, verbose=0), expected[mode], atol=1e-5)
    for mode in ("exact", "expected", "softmax", "exact"):
        for given in (outer, inner, inner.layers[-1]):
            set_predict_mode(given, "softmax")
            np.testing.assert_allclose(outer.predict(x, verbose=0), expected["softmax"], atol=1e-5)
            set_predict_mode(given, mode)
            np.testing.assert_allclose(outer.predict(x, verbose=0), expected[mode], atol=1e-5)
            found = outer.evaluate(x, np.zeros(40), batch_size=40, verbose=0, return_dict=True)
            assert float(found["mean"]) == pytest.approx(expected[mode][:, 0].mean(), rel=1e-5)


def test_no_samples_keep_those_of_the_head():
    model = classifier(predict_samples=100)
    head = model.layers[-1]
    set_predict_mode(model, "sampled")
    assert head.predict_samples == 100
    with predict_mode(model, "exact"):
        assert head.predict_samples == 100
    set_predict_mode(model, "sampled", samples=7)
    assert head.predict_samples == 7


def test_what_is_no_mode_and_no_model_is_refused():
    model = classifier()
    for arguments in [("mean",), (None,), ("sampled", 0), ("sampled", 1.5), (["exact"],)]:
        for change in (set_predict_mode, lambda *a: predict_mode(*a).__enter__()):
            with pytest.raises(ValueError, match=r"must be.*Received"):
                change(model, *arguments)
        assert model.layers[-1].predict_mode == "expected"
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="plain")
    for change in (set_predict_mode, lambda *a: predict_mode(*a).__enter__()):
        with pytest.raises(ValueError, match=r"at least one DropMaxHead.*'plain'"):
            change(plain, "exact")
        with pytest.raises(ValueError, match="Keras model or layer"):
            change("model", "exact")


@pytest.mark.slow
@pytest.mark.parametrize("posterior", ["prior", pytest.param("label", marks=pytest.mark.long)])
@pytest.mark.parametrize("mode", ["expected", pytest.param("softmax", marks=pytest.mark.long)])
def test_no_more_graphs_stay_than_with_dense(x, mode, posterior):
    """Keras itself keeps some at every `compile`."""

    def growth(head, loss):
        model = keras.Sequential([keras.Input((6,)), head])
        held = []
        for temperature in (1.0, 2.0, 3.0, 4.0):
            model.compile("sgd", loss)
            model.fit(x, np.zeros(40), verbose=0)
            if isinstance(head, DropMaxHead):
                set_predict_temperature(model, temperature)
            model.predict(x, verbose=0)
            gc.collect()
            held.append(
                sum(isinstance(each, tf.__internal__.FuncGraph) for each in gc.get_objects())
            )
        return held[3] - held[2]

    ours = growth(DropMaxHead(4, predict_mode=mode, posterior=posterior), DropMaxLoss())
    assert ours <= growth(keras.layers.Dense(4), "sparse_categorical_crossentropy")


def test_a_head_that_keras_does_not_track_follows(x):
    inner = classifier()
    expected = by_functional(inner, x)
    hidden, head = inner.layers

    class Holder:
        def __init__(self, layer):
            self.layer = layer

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            vars(self)["holder"] = Holder(head)

        def call(self, x):
            return self.holder.layer(hidden(x))

    by_closure = keras.layers.Lambda(lambda h: head(h), output_shape=(4,))
    for model in (keras.Sequential([keras.Input((6,)), hidden, by_closure]), Model()):
        for mode in ("expected", "exact", "softmax", "exact", "expected"):
            set_predict_mode(head, mode)
            np.testing.assert_allclose(model.predict(x, verbose=0), expected[mode], atol=1e-5)
            with predict_mode(head, "softmax"):
                found = model.predict(x, verbose=0)
            np.testing.assert_allclose(found, expected["softmax"], atol=1e-5)
            np.testing.assert_allclose(model.predict(x, verbose=0), expected[mode], atol=1e-5)


def test_a_switch_that_fails_leaves_the_mode_as_it_was(x):
    class Model(keras.Sequential):
        fails = False

        def make_predict_function(self, *args, **kwargs):
            if self.fails:
                raise RuntimeError("no function today")
            return super().make_predict_function(*args, **kwargs)

    model = Model([keras.Input((6,)), *classifier().layers])
    before = model.predict(x, verbose=0)
    with predict_mode(model, "exact"):
        model.predict(x, verbose=0)
    model.fails = True
    with pytest.raises(RuntimeError, match="today"), predict_mode(model, "softmax"):
        model.predict(x, verbose=0)
    model.fails = False
    assert model.layers[-1].predict_mode == "expected"
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)


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


def test_a_temperature_is_not_traced(x, monkeypatch):
    model = classifier()
    before = model.predict(x, verbose=0)
    traces = count_traces(model, monkeypatch)
    set_predict_temperature(model, 2.0)
    after = model.predict(x, verbose=0)
    assert not traces
    np.testing.assert_allclose(after, tf.nn.log_softmax(before / 2), atol=1e-5)


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


def test_a_wrong_mode_raises_where_the_context_manager_is_made():
    with pytest.raises(ValueError, match="`mode` must be one of"):
        predict_mode(classifier(), "exxact")
