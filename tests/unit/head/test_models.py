"""The losses that a head refuses in the model around it, and what Keras does to its branches."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import DETERMINISTIC, GLOROT, MODES, classifier

from tf_dropmax import DropMaxHead, DropMaxLoss

KERAS_LOSSES = [
    "sparse_categorical_crossentropy",
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    keras.losses.sparse_categorical_crossentropy,
]


@pytest.mark.parametrize("loss", KERAS_LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_losses_of_keras_are_refused(blobs, loss, jit_compile):
    model = keras.Sequential([keras.Input((6,)), DropMaxHead(4)])
    model.compile("adam", loss, jit_compile=jit_compile)
    for train in (model.fit, model.train_on_batch):
        with pytest.raises(ValueError, match=r"compiled with `tf_dropmax\.DropMaxLoss\(\)`"):
            train(*blobs)
    model.evaluate(*blobs, verbose=0)  # Log-probabilities are logits for a loss of Keras.
    model.compile("adam", DropMaxLoss())
    model.fit(*blobs, verbose=0)


def test_a_head_in_a_model_of_several_losses(blobs):
    x, y = blobs
    inputs = keras.Input((6,))
    outputs = {"a": DropMaxHead(4)(inputs), "b": keras.layers.Dense(4)(inputs)}
    model = keras.Model(inputs, outputs)
    model.compile("adam")
    with pytest.raises(ValueError, match="DropMaxLoss"):
        model.fit(x, {"a": y, "b": y}, verbose=0)
    model.compile("adam", {"a": DropMaxLoss(), "b": KERAS_LOSSES[1]})
    model.fit(x, {"a": y, "b": y}, verbose=0)
    model.compile("adam", {"a": KERAS_LOSSES[1], "b": KERAS_LOSSES[1]})
    with pytest.raises(ValueError, match="DropMaxLoss"):
        model.fit(x, {"a": y, "b": y}, verbose=0)


@keras.saving.register_keras_serializable("tests")
def own_loss(y_true, y_pred):
    return DropMaxLoss()(y_true, y_pred)


def test_what_is_the_users_own_is_allowed(blobs):
    class OwnStep(keras.Sequential):
        def train_step(self, data):
            return {"loss": tf.reduce_mean(self(data[0], training=True))}

    class OwnLoss(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return DropMaxLoss()(y, y_pred) + sum(self.losses)

    for kind, loss in [
        (OwnStep, KERAS_LOSSES[0]),
        (OwnLoss, KERAS_LOSSES[0]),
        (keras.Sequential, own_loss),
    ]:
        model = kind([keras.Input((6,)), DropMaxHead(4)])
        model.compile("sgd", loss)
        assert np.isfinite(model.fit(*blobs, verbose=0).history["loss"][0])


def distiller_of(teacher, student):
    strategy = keras.distillation.LogitsDistillation(loss="mse")
    distiller = keras.distillation.Distiller(teacher, student, strategy)
    distiller.compile("sgd", KERAS_LOSSES[1])
    return distiller


def test_a_distiller_follows_its_teacher_and_refuses_the_head_as_its_student(blobs):
    x, y = blobs
    student = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    teacher = classifier()

    def evaluated(distiller, mode):
        teacher.layers[-1].predict_mode = mode
        return distiller.evaluate(x, y, verbose=0, return_dict=True)["distillation_loss"]

    expected = {mode: evaluated(distiller_of(teacher, student), mode) for mode in DETERMINISTIC}
    assert len({round(value, 3) for value in expected.values()}) == 3
    distiller = distiller_of(teacher, student)
    for mode in ("softmax", "exact", "softmax", "expected"):
        assert evaluated(distiller, mode) == pytest.approx(expected[mode], rel=1e-5)
    distiller = distiller_of(student, classifier())
    with pytest.raises(ValueError, match="takes the scores of a DropMaxHead for logits"):
        distiller.fit(x, y, verbose=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize`:UserWarning")
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning")
def test_quantize_reaches_the_branches(blobs, tmp_path, mode):
    x, y = blobs
    model = classifier({}, posterior="label", predict_mode=mode, predict_samples=400)
    model.fit(x, y, verbose=0)
    before = np.exp(model.predict(x, verbose=0))
    model.quantize("int8")
    branches = model.layers[-1].branches.values()
    assert {branch.quantization_mode for branch in branches} == {"int8"}
    after = model.predict(x, verbose=0)
    assert 1e-6 < np.abs(np.exp(after) - before).max() < 0.2
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    if mode != "sampled":
        np.testing.assert_array_equal(loaded.predict(x, verbose=0), after)


def test_an_int8_policy(rng, tmp_path):
    x = rng.normal(size=(5, 6)).astype("float32")
    head = DropMaxHead(4, dtype="int8_from_mixed_bfloat16")
    model = keras.Sequential([keras.Input((6,)), head])
    assert {branch.quantization_mode for branch in head.branches.values()} == {"int8"}
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].get_config() == head.get_config()
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_lora_trains_few_weights_and_survives_a_file(blobs, tmp_path):
    x, y = blobs
    head = DropMaxHead(4, seed=1, retain=GLOROT, posterior="label")
    model = keras.Sequential([keras.Input((6,)), head])
    for name in ("classes", "retain"):
        head.branches[name].enable_lora(2)
    model.compile(keras.optimizers.Adam(0.1), DropMaxLoss())
    before = [head.branches[name]._kernel.numpy() for name in ("classes", "retain")]
    model.fit(x, y, epochs=3, verbose=0)
    after = [head.branches[name]._kernel.numpy() for name in ("classes", "retain")]
    np.testing.assert_array_equal(after, before)  # The product of two small kernels is trained.
    assert model.evaluate(x, y, verbose=0) < np.log(4)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert [branch.lora_enabled for branch in loaded.layers[-1].branches.values()] == [1, 1, 0]


@pytest.mark.parametrize("frozen", ["head", "classes", "retain", "auxiliary"])
def test_frozen_heads_and_branches_stay_frozen(frozen, tmp_path):
    head = DropMaxHead(4, posterior="label", trainable=frozen != "head")
    if frozen != "head":
        head.branches[frozen].trainable = False
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6), head])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded, keras.models.clone_model(model)):
        trainable = {name: len(b.trainable_weights) for name, b in each.layers[-1].branches.items()}
        assert trainable == {name: 0 if frozen in ("head", name) else 2 for name in trainable}
        assert len(each.trainable_weights) == 2 + sum(trainable.values())


def test_a_changed_config():
    def again(head, **changes):
        return DropMaxHead.from_config({**head.get_config(), **changes})

    assert again(DropMaxHead(4), dtype="float64").branches["classes"].compute_dtype == "float64"
    head = again(DropMaxHead(4, trainable=False), trainable=True, units=5)
    assert all(branch.trainable and branch.units == 5 for branch in head.branches.values())
    label = again(DropMaxHead(4, use_bias=False, retain=GLOROT), posterior="label")
    assert not any(branch.use_bias for branch in label.branches.values())
    initializer = label.branches["auxiliary"].kernel_initializer
    assert isinstance(initializer, keras.initializers.GlorotUniform)


def test_a_map_of_dtype_policies():
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="mixed_bfloat16")
    head = DropMaxHead(3, dtype=policies)
    assert head(np.ones((2, 4), "float32")).dtype == "float32"
    assert head.branches["retain"].compute_dtype == "bfloat16"


def test_one_initializer_for_two_branches():
    start = keras.initializers.GlorotUniform()
    head = DropMaxHead(3, posterior="label", retain={"kernel_initializer": start})
    head.build((None, 4))
    kernels = [branch.kernel.numpy() for branch in head.branches.values()]
    assert not np.allclose(kernels[1], kernels[2])
