"""What the head is trained on: its scores, `add_loss` and the loss together, for given draws."""

import keras
import numpy as np
import oracles
import pytest
import tensorflow as tf
from models import PAPER_START, VARIANTS, selecting_head
from scipy import stats

from tf_dropmax import DropMaxHead, DropMaxLoss, functional

TOLERANCES = pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])


def value_and_gradients(head, branches, labels, dtype):
    features = tf.constant(np.concatenate(branches, axis=1), dtype)
    with tf.GradientTape() as tape:
        tape.watch(features)
        scores = head(features, training=True)
        (entropy_term,) = head.losses
        value = DropMaxLoss(dtype=dtype)(labels, scores) + tf.cast(entropy_term, dtype)
    assert scores.dtype == dtype
    return value.numpy(), np.split(tape.gradient(value, features).numpy(), len(branches), axis=1)


@pytest.fixture(autouse=True)
def _floatx(request):
    """The entropy term has the dtype `floatx`, as every loss that Keras adds up."""
    if "float64" in request.node.name:
        keras.config.set_floatx("float64")


@pytest.fixture
def real_path(monkeypatch):
    """Value and gradients by a head in training, for given draws and settings."""

    def run(branches, uniform, labels, entropy_weight, temperature, dtype, **kwargs):
        monkeypatch.setattr(
            functional, "uniform_draws", lambda shape, seed, dtype: tf.constant(uniform, dtype)
        )
        weights = {"entropy_weight": entropy_weight, "temperature": temperature}
        head = selecting_head(branches[0].shape[1], dtype=dtype, **weights, **kwargs)
        return value_and_gradients(head, branches, labels, dtype)

    return run


@TOLERANCES
def test_prior_is_eq_15(rng, real_path, dtype, tolerance):
    o, r = branches = 3 * rng.normal(size=(2, 10, 5))
    arguments = (rng.uniform(0.01, 0.99, size=(10, 5)), rng.integers(5, size=10), 0.7, 0.2)
    value, gradients = real_path(branches, *arguments, dtype)
    assert value == pytest.approx(oracles.objective(o, r, *arguments), rel=tolerance)
    by_o = oracles.central_differences(lambda o: oracles.objective(o, r, *arguments), o, 1e-5)
    by_r = oracles.central_differences(lambda r: oracles.objective(o, r, *arguments), r, 1e-5)
    np.testing.assert_allclose(gradients, [by_o, by_r], atol=1e-6)


@TOLERANCES
@pytest.mark.parametrize(
    ("names", "prefix", "variant"),
    [
        (["logits", "retain"], "", {}),
        (
            ["logits", "retain", "auxiliary"],
            "label_",
            {"posterior": "label", "auxiliary_weight": 1},
        ),
    ],
    ids=["prior", "label"],
)
def test_golden_objectives(golden, real_path, dtype, tolerance, names, prefix, variant):
    branches = [golden["logits"], *(golden[f"{name}_logits"] for name in names[1:])]
    settings = (golden["uniform"], golden["labels"], float(golden["lam"]), float(golden["tau"]))
    value, gradients = real_path(branches, *settings, dtype, **variant)
    assert value == pytest.approx(float(golden[f"{prefix}objective"]), rel=tolerance)
    expected = [golden[f"{prefix}grad_{name}"] for name in names]
    np.testing.assert_allclose(gradients, expected, atol=1e-6)


@TOLERANCES
def test_label(rng, real_path, dtype, tolerance):
    o, r, a = branches = 2 * rng.normal(size=(3, 8, 5))
    uniform, labels = rng.uniform(0.01, 0.99, size=(8, 5)), rng.integers(5, size=8)
    arguments = (uniform, labels, 0.7, 0.4, 0.2)  # entropy weight, auxiliary weight, temperature
    value, gradients = real_path(
        branches, uniform, labels, 0.7, 0.2, dtype, posterior="label", auxiliary_weight=0.4
    )
    assert value == pytest.approx(oracles.label_objective(o, r, a, *arguments), rel=tolerance)

    def by(branch, objective):
        return oracles.central_differences(objective, branch, 1e-5)

    by_o = by(o, lambda o: oracles.label_objective(o, r, a, *arguments))
    by_a = by(a, lambda a: oracles.label_objective(o, r, a, *arguments))

    # The prior within the posterior is held fixed. If r grows and a falls by as much, the posterior
    # does not move. Only the prior and the loss of the auxiliary classifier move. That loss is all
    # that depends on a alone.
    def auxiliary(a):
        s = oracles.sigmoid(a)
        return -0.4 * np.sum(np.where(np.eye(5)[labels], np.log(s), np.log(1 - s))) / 8

    together = by(r, lambda x: oracles.label_objective(o, x, a + r - x, *arguments))
    alone = by(r, lambda x: auxiliary(a + r - x))
    np.testing.assert_allclose(gradients, [by_o, together - alone, by_a], atol=1e-6)


@TOLERANCES
def test_label_without_masks_trains_on_their_means(rng, dtype, tolerance):
    o, r, a = branches = 2 * rng.normal(size=(3, 8, 5))
    labels, settings = rng.integers(5, size=8), {"entropy_weight": 0.7, "auxiliary_weight": 0.3}
    head = selecting_head(5, posterior="label", stochastic=False, dtype=dtype, **settings)
    value, gradients = value_and_gradients(head, branches, labels, dtype)

    def objective(o, a):
        return oracles.label_objective(o, r, a, [None] * 8, labels, 0.7, 0.3, 0.1)

    assert value == pytest.approx(objective(o, a), rel=tolerance)
    by_o = oracles.central_differences(lambda o: objective(o, a), o, 1e-5)
    by_a = oracles.central_differences(lambda a: objective(o, a), a, 1e-5)
    np.testing.assert_allclose(gradients[::2], [by_o, by_a], atol=1e-6)


def test_attention_trains_on_eq_18(rng):
    branches, labels = rng.normal(size=(2, 6, 4)), np.arange(6) % 4
    head = selecting_head(4, stochastic=False, entropy_weight=0.5, dtype="float64")
    keras.config.set_floatx("float64")
    value, _ = value_and_gradients(head, branches, labels, "float64")
    expected = 0.0
    for o, r, y in zip(*branches, labels, strict=True):
        rho = oracles.sigmoid(r)
        h = -rho * np.log(rho) - (1 - rho) * np.log(1 - rho)
        expected -= np.log(rho[y] * np.exp(o[y]) / np.sum(rho * np.exp(o))) + 0.5 * (h.sum() - h[y])
    assert value == pytest.approx(expected / 6, rel=1e-12)


def test_random_has_no_retain_branch_and_no_entropy(rng):
    features = rng.normal(size=(5000, 3)).astype("float32")
    head = DropMaxHead(4, retain_probability=0.3, kernel_initializer="zeros", seed=1)
    scores = head(features, training=True)
    assert list(head.branches) == ["classes"]
    assert head.losses == []
    # With equal logits, a target competes with a binomial number of the 3 others.
    counts = np.bincount((1 / np.exp(scores[:, 0])).round().astype(int), minlength=5)[1:]
    expected = 5000 * stats.binom.pmf(range(4), 3, 0.3)
    assert stats.chisquare(counts, expected).pvalue > 1e-4  # the seed is fixed
    for function in [head.retain_probabilities, tf.function(head.retain_probabilities)]:
        np.testing.assert_allclose(function(features), np.full((5000, 4), 0.3), rtol=1e-6)
    for mode in ["expected", "softmax", "exact"]:
        head.predict_mode = mode
        np.testing.assert_allclose(np.exp(head(features[:9])), 0.25, atol=1e-6)


def test_entropy_term_value_and_mask(rng):
    features = rng.normal(size=(2, 3, 4)).astype("float32")
    mask = np.array([[True, False, True], [False, False, True]])
    head = DropMaxHead(5, entropy_weight=0.25, **PAPER_START)
    head(features, training=True, mask=mask)
    rho = oracles.sigmoid(features @ head.branches["retain"].kernel.numpy())
    h = np.sum(-rho * np.log(rho) - (1 - rho) * np.log(1 - rho), axis=-1)
    assert head.losses[0].numpy() == pytest.approx(-0.25 * h[mask].mean(), rel=1e-5)
    head(features, training=True)
    assert head.losses[-1].numpy() == pytest.approx(-0.25 * h.mean(), rel=1e-5)
    empty = DropMaxHead(5)
    empty(features, training=True, mask=np.zeros((2, 3), bool))
    assert empty.losses[0].numpy() == 0


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "random"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_weights_rise_in_the_first_steps(variant, jit_compile):
    # The retain and the auxiliary logits are 1, the other logits 0, and drawn masks 1/2.
    start = {"kernel_initializer": "zeros", "retain": {"bias_initializer": "ones"}}
    weights = {"entropy_weight": 2.0, "auxiliary_weight": 0.0, "temperature": 1e6}
    head = DropMaxHead(4, **start, **weights, **VARIANTS[variant])

    @tf.function(jit_compile=jit_compile)
    def step():
        return head(tf.ones((5, 3)), training=True)[0, 0], head.losses[-1]

    rho, q = oracles.sigmoid([1, 2])
    entropy, others = (stats.entropy([p, 1 - p], x) for p, x in [(rho, None), (q, [rho, 1 - rho])])
    kl = (variant != "attention") * -np.log(rho) + ("label" in variant) * 3 * others
    likelihood = -np.log(1 + 3 * {"attention": 1, "label-means": q}.get(variant, 0.5))
    for weight, steps in [(0, 4), (0.25, 4), (0.5, 4), (0.75, 4), (1, 4), (0.5, 10)]:
        head.warmup_steps = steps
        score = likelihood - weight * kl - ("label" not in variant) * 2 * weight * entropy
        np.testing.assert_allclose(step(), [score, -2 * weight * 4 * entropy], atol=2e-6)


def test_label_keeps_the_masks_of_many_classes(rng):
    """With a warm-up, the mean retain probability falls to 0.001."""
    labels = np.arange(1000) % 200
    x = rng.uniform(size=(200, 200))[labels] + 0.3 * rng.normal(size=(1000, 200))
    features = keras.Sequential([keras.Input((200,)), keras.layers.Dense(500, "relu")])
    head = DropMaxHead(200, posterior="label", seed=0)
    assert (head.warmup_steps, DropMaxHead(200).warmup_steps) == (0, 100)
    model = keras.Sequential([features, head])
    model.compile(keras.optimizers.Adam(1e-3), DropMaxLoss())
    model.fit(x, labels, batch_size=100, epochs=3, verbose=0)
    assert head.retain_probabilities(features(x)).numpy().mean() > 0.3


@pytest.mark.filterwarnings("ignore:A total of 2 objects")
@pytest.mark.parametrize(("units", "steps"), [(4, 2), (5, 0)])
def test_a_resumed_training_goes_on_with_the_weights(rng, tmp_path, units, steps):
    features = rng.normal(size=(5, 3)).astype("float32")
    head, resumed = (DropMaxHead(k, warmup_steps=4, name="head") for k in (4, units))
    models = [keras.Sequential([keras.Input((3,)), each]) for each in (head, resumed)]
    head.predict_temperature = 2.0
    for _ in range(2):
        head(features, training=True)
    models[0].save_weights(tmp_path / "model.weights.h5")
    models[1].load_weights(tmp_path / "model.weights.h5", skip_mismatch=True)
    resumed(features, training=True)
    expected = -steps / 4 * units * np.log(2)
    assert resumed.losses[-1].numpy() == pytest.approx(expected, rel=1e-5)
    assert resumed.predict_temperature == (2.0 if steps else 1.0)
