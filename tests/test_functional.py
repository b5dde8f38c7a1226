import numpy as np
import oracles
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from scipy import stats

from tf_dropmax import functional

DTYPES = ["float32", "float64"]
PREDICTIONS = {
    "expected": functional.expected_log_probabilities,
    "exact": functional.exact_log_probabilities,
    "sampled": lambda o, r: functional.sampled_log_probabilities(o, r, samples=7, seed=(1, 2)),
    "softmax": lambda o, r: functional.softmax_log_probabilities(o),
}


@pytest.fixture
def case(rng):
    """Rows like those of the golden file, with a saturated one."""
    logits, retain_logits = 3 * rng.normal(size=(12, 6)), 3 * rng.normal(size=(12, 6))
    retain_logits[0] = [-14, 14, -14, 14, 0, 0]
    return {
        "logits": logits,
        "retain_logits": retain_logits,
        "uniform": rng.uniform(0.01, 0.99, size=(12, 6)),
        "labels": rng.integers(6, size=12),
    }


def training_objective(logits, retain_logits, uniform, labels, entropy_weight, temperature):
    masks = functional.relaxed_mask_logits(retain_logits, uniform, temperature)
    scores, entropy = functional.prior_scores_and_entropy(
        logits, retain_logits, masks, entropy_weight
    )
    return tf.reduce_mean(-tf.gather(scores, labels, batch_dims=1) - entropy_weight * entropy)


def value_and_gradients(function, *arguments):
    arguments = [tf.constant(x) for x in arguments]
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        value = function(*arguments)
    return value.numpy(), [g.numpy() for g in tape.gradient(value, arguments)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_objective_and_gradient_are_those_of_eq_15(case, dtype, tolerance):
    settings = (case["uniform"], case["labels"], 0.3, 0.1)
    expected = oracles.objective(case["logits"], case["retain_logits"], *settings)
    value, gradients = value_and_gradients(
        lambda o, r: training_objective(o, r, settings[0].astype(dtype), *settings[1:]),
        case["logits"].astype(dtype),
        case["retain_logits"].astype(dtype),
    )
    assert value == pytest.approx(expected, rel=tolerance)
    by_differences = [
        oracles.central_differences(
            lambda o: oracles.objective(o, case["retain_logits"], *settings), case["logits"], 1e-5
        ),
        oracles.central_differences(
            lambda r: oracles.objective(case["logits"], r, *settings), case["retain_logits"], 1e-6
        ),
    ]
    for gradient, difference in zip(gradients, by_differences, strict=True):
        assert np.abs(difference).max() > 1e-2
        np.testing.assert_allclose(gradient, difference, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_golden_objective(golden, dtype, tolerance):
    uniform, settings = (
        golden["uniform"].astype(dtype),
        (golden["labels"], float(golden["lam"]), float(golden["tau"])),
    )
    value, (grad_logits, grad_retain) = value_and_gradients(
        lambda o, r: training_objective(o, r, uniform, *settings),
        golden["logits"].astype(dtype),
        golden["retain_logits"].astype(dtype),
    )
    assert value == pytest.approx(float(golden["objective"]), rel=tolerance)
    np.testing.assert_allclose(grad_logits, golden["grad_logits"], atol=1e-6)
    np.testing.assert_allclose(grad_retain, golden["grad_retain"], atol=1e-6)


@pytest.mark.parametrize("mode", ["expected", "exact", "softmax"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_predictions(golden, mode, dtype):
    log_p = PREDICTIONS[mode](golden["logits"].astype(dtype), golden["retain_logits"].astype(dtype))
    np.testing.assert_allclose(np.exp(log_p), golden[mode], atol=1e-5 if mode == "exact" else 1e-6)


def test_scores_have_second_derivatives(case):
    """A custom gradient must not cut higher derivatives off: by logits, retain logits, mask logits, and mixed ones."""
    start = np.concatenate(
        [case[key][1] for key in ("logits", "retain_logits")] + [np.linspace(-3, 2, 6)]
    )

    def value(x):
        scores, entropy = functional.prior_scores_and_entropy(*tf.split(x, 3), entropy_weight=0.3)
        return tf.reduce_sum(scores * np.linspace(-1, 2, 6)) + 0.7 * entropy

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = value(x)
        return tape.gradient(y, x)

    point = tf.constant(start)
    with tf.GradientTape() as tape:
        tape.watch(point)
        g = gradient(point)
    hessian = tape.jacobian(g, point)
    step = 1e-5
    for index, shift in enumerate(step * np.eye(18)):
        difference = (gradient(point + shift) - gradient(point - shift)) / (2 * step)
        np.testing.assert_allclose(hessian[:, index], difference, atol=1e-7)


@pytest.mark.parametrize("traced", [False, True])
def test_arguments_of_scores_broadcast(rng, traced):
    """Value and gradients are those of the repeated arguments, also where shapes are unknown when the graph is traced."""
    shapes = (1, 3), (4, 3), (2, 1, 3)
    arguments = [tf.constant(rng.normal(size=shape)) for shape in shapes]
    repeated = [tf.constant(np.broadcast_to(x, (2, 4, 3)).copy()) for x in arguments]
    weights = rng.normal(size=(2, 4, 3))

    def run(*arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            scores, entropy = functional.prior_scores_and_entropy(*arguments, 0.3)
            likelihood = functional.target_log_likelihood(arguments[0], arguments[2])
            prediction = functional.expected_log_probabilities(*arguments[:2])
            total = tf.reduce_sum(weights * scores) + tf.reduce_sum(weights[..., 0] * entropy)
            total += tf.reduce_sum(weights * likelihood) + tf.reduce_sum(weights * prediction)
        return total, *tape.gradient(total, arguments)

    function = (
        tf.function(
            run, input_signature=[tf.TensorSpec([None] * len(s), tf.float64) for s in shapes]
        )
        if traced
        else run
    )
    total, *gradients = function(*arguments)
    expected, *full = run(*repeated)
    assert float(total) == pytest.approx(float(expected), rel=1e-12)
    for gradient, by_repeated, shape in zip(gradients, full, shapes, strict=True):
        aligned = (1,) * (3 - len(shape)) + shape
        summed = by_repeated.numpy().sum(
            tuple(np.flatnonzero(np.array(aligned) != (2, 4, 3))), keepdims=True
        )
        np.testing.assert_allclose(gradient, summed.reshape(shape), atol=1e-12)


def test_the_entropy_weight_keeps_its_digits(case):
    masks = functional.relaxed_mask_logits(case["retain_logits"], case["uniform"])
    one, other = (
        functional.prior_scores_and_entropy(case["logits"], case["retain_logits"], masks, w)[0]
        for w in (0.7, tf.constant(0.7, "float64"))
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_keep_what_is_added_to_them(rng, dtype):
    """Between 1e7 and 1e12 the gaps of float32 are of the size of a mask's logarithm."""
    logits = (10 ** rng.uniform(7, 12, size=(300, 3))).astype(dtype)
    masks = np.full((300, 3), -200, dtype)
    likelihood, gradients = value_and_gradients(functional.target_log_likelihood, logits, masks)
    target = logits.argmax(-1)
    np.testing.assert_allclose(np.take_along_axis(likelihood, target[:, None], -1), 0, atol=1e-5)
    assert np.isfinite(likelihood).all()
    assert np.isfinite(gradients).all()


def test_random_dropmax_is_a_softmax_over_the_retained(rng):
    logits, uniform = rng.normal(size=(5, 4)), rng.uniform(size=(5, 4))
    likelihood = functional.target_log_likelihood(
        logits, functional.bernoulli_mask_logits(0.4, uniform)
    )
    for row in range(5):
        for y in range(4):
            keep = uniform[row] < 0.4
            keep[y] = True
            expected = np.exp(logits[row, y]) / np.exp(logits[row][keep]).sum()
            assert np.exp(likelihood[row, y]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_is_open_reproducible_and_well_distributed(dtype):
    draws = functional.uniform_draws((1000, 1000), (3, 4), dtype).numpy()
    assert draws.dtype == dtype
    assert 0 < draws.min() < 1e-5
    assert 1 - 1e-5 < draws.max() < 1
    np.testing.assert_array_equal(draws, functional.uniform_draws((1000, 1000), (3, 4), dtype))
    compiled = tf.function(functional.uniform_draws, jit_compile=True)
    others = [
        functional.uniform_draws((1000, 1000), seed, dtype)
        for seed in [(4, 4), (3, 5), (2**62, -1)]
    ]
    others += [compiled((1000, 1000), tf.constant(seed), dtype) for seed in [(3, 4), (3, 5)]]
    assert np.abs(others[-1] - others[-2]).mean() == pytest.approx(1 / 3, abs=2e-3)
    for other in others:
        assert np.abs(draws - other).mean() == pytest.approx(1 / 3, abs=2e-3)
    for sample in [draws, *others]:  # the seeds are fixed: passes always or never
        assert stats.kstest(np.ravel(sample)[:100_000], "uniform").pvalue > 1e-6


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_masks_are_distributed_as_relaxed_bernoulli(temperature):
    """Kolmogorov-Smirnov on 20,000 draws at each of five retain logits; a right sampler fails once in 10^5 seeds."""
    for retain_logit in [-3.0, -0.5, 0.0, 1.0, 4.0]:
        uniform = functional.uniform_draws((20_000,), (5, 6))
        masks = functional.relaxed_mask_logits(
            tf.fill([20_000], retain_logit), uniform, temperature
        ).numpy()
        # On the scale of logits, where neither sample piles up at 0 or 1 by rounding.
        reference = tfp.distributions.RelaxedBernoulli(temperature, logits=np.float64(retain_logit))
        reference = reference.sample(20_000, seed=7).numpy()
        inside = (reference > 0) & (reference < 1)
        reference = np.where(
            inside,
            np.log(np.where(inside, reference, 0.5)) - np.log1p(-np.where(inside, reference, 0.5)),
            0,
        )
        assert inside.mean() > 0.99 or temperature == 0.1
        low, high = -30, 30  # float64 draws resolve logits up to 36
        assert (
            stats.ks_2samp(
                masks.clip(low, high), np.where(inside, reference, high).clip(low, high)
            ).pvalue
            > 1e-5 / 10
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 10.0, 30.0, 60.0])
def test_exact_agrees_with_enumeration(rng, dtype, spread):
    logits = spread * rng.uniform(size=(150, 9))
    logits[:, 0], logits[:, 1] = 0, spread
    retain_logits = rng.uniform(-15, 15, size=(150, 9))
    retain_logits[:50] = rng.uniform(-15, -3, size=(50, 9))
    retain_logits[50:80] = rng.uniform(-1, 1, size=(30, 9))
    log_p = functional.exact_log_probabilities(
        logits.astype(dtype), retain_logits.astype(dtype)
    ).numpy()
    reference = oracles.enumerate_masks(logits.astype(dtype), retain_logits.astype(dtype))
    np.testing.assert_allclose(np.exp(log_p), reference, atol=2e-6 if dtype == "float32" else 1e-12)
    np.testing.assert_allclose(
        log_p, np.log(reference), atol=1e-3
    )  # small probabilities keep their size, too


def test_exact_keeps_the_size_of_small_probabilities():
    logits = np.array([[12.7, 20.5, -58.1, -20.9, 24.7, -34.1]], "float32")
    retain_logits = np.full((1, 6), 12, "float32")
    reference = np.log(oracles.enumerate_masks(logits, retain_logits))
    np.testing.assert_allclose(
        functional.exact_log_probabilities(logits, retain_logits), reference, atol=5e-3
    )
    assert reference.min() < -55


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32"])
def test_other_types_are_computed_in_float32(dtype):
    logits = tf.cast([[1, 2, 3]], dtype)
    for mode, function in PREDICTIONS.items():
        log_p = function(logits, logits)
        assert log_p.dtype == "float32"
        np.testing.assert_allclose(log_p, function(*[tf.cast(logits, "float32")] * 2), err_msg=mode)


def test_exact_beyond_the_quadrature_range(rng):
    logits = rng.choice([0.0, 70.0, 1e4, 1e30], size=(60, 6)) + rng.uniform(size=(60, 6))
    retain_logits = rng.uniform(-5, 5, size=(60, 6))
    reference = oracles.enumerate_masks(logits, retain_logits)
    np.testing.assert_allclose(
        np.exp(functional.exact_log_probabilities(logits, retain_logits)), reference, atol=1e-11
    )


@pytest.mark.parametrize("classes", [1, 100, 10_000])
def test_exact_with_one_class_and_with_many(classes):
    """Where enumeration is out of reach: against a much finer quadrature, and against what symmetry demands."""
    logits = np.zeros((4, classes), "float32")
    logits[0, 0], logits[1, 0], logits[2] = np.log(classes), 3, np.linspace(0, 12, classes)
    for retain_logit in [-4.0, 0.0, 3.0]:
        retain_logits = np.full((4, classes), retain_logit, "float32")
        p = np.exp(functional.exact_log_probabilities(logits, retain_logits))
        reference = np.exp(
            functional.exact_log_probabilities(
                logits.astype("float64"), retain_logits.astype("float64")
            )
        )
        np.testing.assert_allclose(p, reference, atol=5e-6)
        np.testing.assert_allclose(p[3], 1 / classes, rtol=1e-3)


@pytest.mark.parametrize("mode", PREDICTIONS)
def test_rows_do_not_touch_each_other(rng, mode):
    logits, retain_logits = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    before = PREDICTIONS[mode](logits, retain_logits).numpy()
    for value in [np.nan, np.inf, -np.inf]:
        for broken in [logits, retain_logits][: 1 if mode == "softmax" else 2]:
            kept, broken[1, 2] = broken[1, 2], value
            after = PREDICTIONS[mode](logits, retain_logits).numpy()
            np.testing.assert_allclose(after[[0, 2]], before[[0, 2]], atol=1e-12)
            if mode == "expected" and np.isinf(value) and (broken is retain_logits or value < 0):
                limit = PREDICTIONS[mode](
                    np.clip(logits, -1e30, 1e30), np.clip(retain_logits, -1e30, 1e30)
                )
                np.testing.assert_allclose(np.exp(after[1]), np.exp(limit[1]), atol=1e-12)
            else:  # a network that diverged must not look like one that does not know
                assert np.isnan(after[1]).all()
            broken[1, 2] = kept


@pytest.mark.parametrize("mode", ["expected", "exact"])
def test_prediction_gradients(rng, mode):
    logits, retain_logits = 2 * rng.normal(size=(3, 5)), 2 * rng.normal(size=(3, 5))
    weights = rng.normal(size=(3, 5))

    def value(o, r):
        return tf.reduce_sum(weights * PREDICTIONS[mode](o, r))

    _, gradients = value_and_gradients(value, logits, retain_logits)
    reference = [
        oracles.central_differences(lambda o: value(o, retain_logits).numpy(), logits, 1e-5),
        oracles.central_differences(lambda r: value(logits, r).numpy(), retain_logits, 1e-5),
    ]
    np.testing.assert_allclose(gradients, reference, atol=1e-7)
    if mode == "exact":  # and against the other definition

        def enumerated(o, r):
            return np.sum(weights * np.log(oracles.enumerate_masks(o, r)))

        by_enumeration = [
            oracles.central_differences(lambda o: enumerated(o, retain_logits), logits, 1e-5),
            oracles.central_differences(lambda r: enumerated(logits, r), retain_logits, 1e-5),
        ]
        np.testing.assert_allclose(gradients, by_enumeration, atol=1e-7)


def test_sampled_gradient(rng):
    logits, retain_logits = (
        rng.normal(size=(6, 4)),
        rng.normal(size=(6, 4)) - np.arange(6)[:, None] / 3 + 0.5,
    )
    weights = rng.normal(size=(6, 4))

    def value(o):
        p = tf.exp(functional.sampled_log_probabilities(o, retain_logits, samples=20, seed=(1, 2)))
        return tf.reduce_sum(weights * tf.math.log(p + 0.01))

    _, (gradient,) = value_and_gradients(value, logits)
    np.testing.assert_allclose(
        gradient, oracles.central_differences(lambda o: value(o).numpy(), logits, 1e-6), atol=1e-7
    )


def test_sampled_is_the_mean_over_hard_masks(rng):
    logits, retain_logits = np.log([[0.5, 0.3, 0.2]]), np.array([[50.0, 0.0, -50.0]])
    drawn = {
        tuple(
            np.exp(functional.sampled_log_probabilities(logits, retain_logits, 1, (s, 2))).round(9)[
                0
            ]
        )
        for s in range(20)
    }
    assert drawn == {(1, 0, 0), (0.625, 0.375, 0)}
    # All masks 0: uniform.
    np.testing.assert_allclose(
        np.exp(functional.sampled_log_probabilities(logits, np.full((1, 3), -50.0))),
        [[1 / 3] * 3],
        rtol=1e-7,
    )
    # 10,000 masks: standard error at most 0.005 in each of 90 numbers; 5 sigma.
    logits, retain_logits = rng.normal(size=(15, 6)), 2 * rng.normal(size=(15, 6))
    draw = tf.function(functional.sampled_log_probabilities)
    p, other = (
        np.exp(draw(logits, retain_logits, tf.constant(10_000), tf.constant(seed)))
        for seed in [(3, 4), (3, 5)]
    )
    np.testing.assert_allclose(p, oracles.enumerate_masks(logits, retain_logits), atol=0.025)
    assert 1e-4 < np.abs(p - other).max() < 0.05


@pytest.mark.parametrize("samples", [2, 500])
def test_sampling_memory_does_not_grow_with_samples(samples):
    """No tensor of the traced forward and backward pass is larger than (B, T), and no loop stacks its iterations."""

    @tf.function
    def gradient(o, r):
        with tf.GradientTape() as tape:
            tape.watch(o)
            value = functional.sampled_log_probabilities(o, r, samples)
        return tape.gradient(value, o)

    traced = gradient.get_concrete_function(tf.TensorSpec((8, 16)), tf.TensorSpec((8, 16)))
    definitions = traced.graph.as_graph_def(add_shapes=True)
    nodes = [
        *definitions.node,
        *(node for function in definitions.library.function for node in function.node_def),
    ]
    assert any("While" in node.op for node in nodes)
    assert not [node.name for node in nodes if node.op.startswith(("TensorList", "Stack"))]
    shapes = [shape for node in nodes for shape in node.attr["_output_shapes"].list.shape]
    sizes = [np.prod([dim.size for dim in shape.dim]) for shape in shapes if not shape.unknown_rank]
    assert max(sizes) == 8 * 16


@pytest.mark.parametrize("mode", PREDICTIONS)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_predictions_under_xla_and_with_any_leading_shape(rng, mode, jit_compile):
    logits, retain_logits = (
        rng.normal(size=(2, 3, 5)).astype("float32"),
        rng.normal(size=(2, 3, 5)).astype("float32"),
    )
    function = tf.function(PREDICTIONS[mode], jit_compile=jit_compile)
    log_p = function(logits, retain_logits)
    assert log_p.shape == (2, 3, 5)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, atol=1e-6)
    if mode != "sampled" or not jit_compile:  # XLA draws other numbers
        flat = PREDICTIONS[mode](logits.reshape(6, 5), retain_logits.reshape(6, 5)).numpy()
        np.testing.assert_allclose(log_p, flat.reshape(2, 3, 5), atol=1e-5)
    assert PREDICTIONS[mode](logits[0, 0], retain_logits[0, 0]).shape == (5,)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_loop_gradients_under_xla(rng, mode, jit_compile):
    def gradient(o, r):
        with tf.GradientTape() as tape:
            tape.watch(o)
            value = PREDICTIONS[mode](o, r)[:, 0]
        return tape.gradient(value, o)

    arguments = [tf.constant(rng.normal(size=(4, 5))) for _ in range(2)]
    if mode == "sampled":
        arguments[1] += 50.0  # XLA draws other numbers: let every class be retained
    compiled = tf.function(gradient, jit_compile=jit_compile)(*arguments)
    np.testing.assert_allclose(compiled, gradient(*arguments), atol=1e-9)


def test_logits_are_shift_invariant(rng):
    logits, retain_logits = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    masks = functional.relaxed_mask_logits(
        retain_logits, functional.uniform_draws((6, 5), (1, 2), "float64")
    )
    functions = {
        **PREDICTIONS,
        "scores": lambda o, r: functional.prior_scores_and_entropy(o, r, masks)[0],
    }
    for name, function in functions.items():
        for shift in [1e3, -1e6]:
            shifted = function(logits + shift, retain_logits)
            np.testing.assert_allclose(
                shifted, function(logits, retain_logits), atol=1e-8, err_msg=name
            )


EXTREMES = [0.0, 1.0, -20.0, 90.0, -1e4, 1e4, 3e8, 1.5e9, -2e9, 1e30, -1e30, 3.4e38, -3.4e38]


@pytest.mark.parametrize("classes", [1, 2, 3, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    [*PREDICTIONS, "scores", "attention", "random", "entropy", "label"],
)
def test_finite_for_any_finite_input(rng, classes, dtype, name):
    """Values and gradients, with every sign and size of logits, masks all 0 and all 1 included."""
    logits = rng.choice(EXTREMES, size=(30, classes)).astype(dtype)
    retain_logits = rng.choice(EXTREMES, size=(30, classes)).astype(dtype)
    retain_logits[0], retain_logits[1], logits[2] = -1e4, 1e4, 0.0
    uniform = functional.uniform_draws((30, classes), (1, 2), dtype)
    functions = {
        **PREDICTIONS,
        "scores": lambda o, r: functional.prior_scores_and_entropy(
            o, r, functional.relaxed_mask_logits(r, uniform, 0.1)
        )[0],
        "attention": lambda o, r: (
            functional.expected_log_probabilities(o, r) - functional.mask_entropy(r)
        ),
        "random": lambda o, r: functional.target_log_likelihood(
            o, functional.bernoulli_mask_logits(0.2, uniform)
        ),
        "entropy": lambda o, r: functional.mask_entropy(r) + 0 * o,
        "label": lambda o, r: functional.label_scores_and_entropy(
            o,
            r,
            r[::-1],
            functional.relaxed_mask_logits(functional.posterior_logits(r, r[::-1]), uniform),
            100.0,
        )[0],
    }
    outputs = {}

    def total(o, r):
        outputs["value"] = functions[name](o, r)
        # Weighed by what a loss could send back, each row by one label or by all.
        return (
            tf.reduce_sum(outputs["value"][::2, 0] / 1e30) * 1e30
            + tf.reduce_sum(outputs["value"][1::2] / 1e30) * 1e30
        )

    arguments = [tf.constant(logits), tf.constant(retain_logits)]
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        value = total(*arguments)
    gradients = tape.gradient(value, arguments, unconnected_gradients="zero")
    assert np.isfinite(outputs["value"]).all()
    assert all(np.isfinite(g).all() for g in gradients)
    if name in PREDICTIONS:
        np.testing.assert_allclose(
            np.exp(outputs["value"].numpy().astype("float64")).sum(-1), 1, atol=1e-5
        )


def test_a_hundred_thousand_classes(rng):
    logits = rng.normal(size=(2, 100_000)).astype("float32")
    retain_logits = (3 * rng.normal(size=(2, 100_000))).astype("float32")
    for name, function in PREDICTIONS.items():
        log_p = function(logits, retain_logits).numpy()
        assert np.isfinite(log_p).all(), name
        np.testing.assert_allclose(
            np.exp(log_p.astype("float64")).sum(-1), 1, atol=1e-4, err_msg=name
        )
    uniform = functional.uniform_draws((2, 100_000), (1, 2))
    scores, gradients = value_and_gradients(
        lambda o, r: functional.prior_scores_and_entropy(
            o, r, functional.relaxed_mask_logits(r, uniform)
        )[0],
        logits,
        retain_logits,
    )
    assert np.isfinite(scores).all()
    assert np.isfinite(gradients).all()
    # With so many classes, the expectation is close to the expected masks.
    np.testing.assert_allclose(
        functional.exact_log_probabilities(logits, retain_logits),
        functional.expected_log_probabilities(logits, retain_logits),
        atol=5e-3,
    )
