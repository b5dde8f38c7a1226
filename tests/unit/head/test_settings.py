"""Entropy weight, temperature and auxiliary weight can be set at any time and are no state."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import PAPER_START, count_traces

from tf_dropmax import DropMaxHead, DropMaxLoss

SETTINGS = {"entropy_weight": 0.3, "temperature": 0.7, "auxiliary_weight": 0.05}


def model_of(**kwargs):
    head = DropMaxHead(4, seed=1, posterior="label", **PAPER_START, **kwargs)
    return keras.Sequential([keras.Input((6,)), head])


def test_values_are_kept_as_they_were_set():
    head = DropMaxHead(4)
    for name, value in SETTINGS.items():
        setattr(head, name, value)
        assert getattr(head, name) == value  # exactly, also in float64
        for number in (np.float32(0.5), np.array(0.5), tf.constant(0.5), np.int64(2)):
            setattr(head, name, number)
            assert getattr(head, name) == float(number)
        setattr(head, name, value)
    assert {name: head.get_config()[name] for name in SETTINGS} == SETTINGS


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, "1", None, True, [0.5]])
def test_what_a_setting_refuses_leaves_it_unchanged(name, value):
    head = DropMaxHead(4, **SETTINGS)
    with pytest.raises(ValueError, match=f"`{name}` must be.*Received"):
        setattr(head, name, value)
    assert getattr(head, name) == SETTINGS[name]


def test_a_checkpoint_does_not_restore_settings(tmp_path):
    saved, loaded = model_of(), model_of(**SETTINGS, predict_mode="exact")
    tf.train.Checkpoint(model=saved).write(tmp_path / "checkpoint")
    tf.train.Checkpoint(model=loaded).read(tmp_path / "checkpoint").assert_consumed()
    saved.save_weights(tmp_path / "model.weights.h5")
    for one, other in zip(loaded.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    loaded.load_weights(tmp_path / "model.weights.h5")
    head = loaded.layers[0]
    assert {name: getattr(head, name) for name in SETTINGS} == SETTINGS
    assert head.predict_mode == "exact"
    assert len(head.weights) == 7


def test_a_checkpoint_restores_the_stream_of_masks(tmp_path):
    x = np.ones((8, 6), "float32")
    whole, resumed = model_of(), model_of()
    whole(x, training=True)
    tf.train.Checkpoint(model=whole).write(tmp_path / "checkpoint")
    tf.train.Checkpoint(model=resumed).read(tmp_path / "checkpoint").assert_consumed()
    np.testing.assert_array_equal(whole(x, training=True), resumed(x, training=True))


def test_an_assignment_in_a_function_leaves_the_other_settings(rng):
    head = DropMaxHead(4, entropy_weight=1.0, temperature=0.1)
    features = tf.constant(rng.normal(size=(5, 3)), tf.float32)

    @tf.function
    def train():
        head.entropy_weight = 0.5
        return head(features, training=True)

    train()
    assert (head.entropy_weight, head.temperature, head.auxiliary_weight) == (0.5, 0.1, 0.1)
    head.temperature, head.entropy_weight = 0.9, 2.0
    train()
    assert (head.entropy_weight, head.temperature, head.auxiliary_weight) == (0.5, 0.9, 0.1)


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_compiled_model_follows(blobs, jit_compile, monkeypatch):
    """The loss of the next step, from the same weights and masks, is that of a fresh model."""
    x, y = blobs
    changes = [{}, {"entropy_weight": 0.25}, {"temperature": 0.7}, {"auxiliary_weight": 2.0}]
    changes.append({"entropy_weight": 0.0, "temperature": 2.0, "auxiliary_weight": 0.0})
    defaults = {"entropy_weight": 1.0, "temperature": 0.1, "auxiliary_weight": 0.1}
    model = model_of()
    model.compile(keras.optimizers.SGD(0.0), DropMaxLoss(), jit_compile=jit_compile)
    (head,) = model.layers
    losses, traces, traced = [], count_traces(model, monkeypatch), []
    weights, steps = model.get_weights(), head._train_seeds.state.numpy()
    fit = {"batch_size": 160, "shuffle": False, "verbose": 0}
    for change in changes:
        for name, value in {**defaults, **change}.items():
            setattr(head, name, value)
        head._train_seeds.state.assign(steps)
        losses.append(model.fit(x, y, **fit).history["loss"][0])
        traced.append(len(traces))
    assert len(set(traced)) == 1
    assert len(set(losses)) == len(losses)
    for change, loss in zip(changes, losses, strict=True):
        fresh = model_of(**change)
        fresh.set_weights(weights)
        fresh.compile(keras.optimizers.SGD(0.0), DropMaxLoss(), jit_compile=jit_compile)
        assert fresh.fit(x, y, **fit).history["loss"][0] == pytest.approx(loss, rel=1e-5)
