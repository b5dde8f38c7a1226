"""Seeds: masks and initial weights are reproducible, and unrelated to each other."""

import random

import keras
import numpy as np
import pytest
from models import GLOROT

from tf_dropmax import DropMaxHead, DropMaxLoss


def test_masks_differ_between_steps_examples_and_positions():
    head, features = DropMaxHead(6, seed=3), np.ones((4, 5, 3), "float32")
    rows = np.reshape([head(features, training=True) for _ in range(2)], (-1, 6))
    assert len(np.unique(rows, axis=0)) == len(rows) == 40


def test_one_seed_makes_training_reproducible(blobs):
    x, y = blobs

    def train(seed):
        model = keras.Sequential([keras.Input((6,)), DropMaxHead(4, seed=seed)])
        model.compile("adam", DropMaxLoss())
        history = model.fit(x, y, epochs=2, batch_size=32, shuffle=False, verbose=0)
        return history.history["loss"], model.get_weights()

    state = np.random.get_state()[1].copy()
    (loss, weights), (loss_again, weights_again), (other_loss, other) = train(5), train(5), train(6)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    assert loss == loss_again
    assert all(np.array_equal(a, b) for a, b in zip(weights, weights_again, strict=True))
    assert loss != other_loss
    assert not np.allclose(weights[1], other[1])


def test_seed_leaves_initializers_with_a_seed_alone():
    initializer = keras.initializers.GlorotNormal(seed=11)
    heads = [DropMaxHead(3, seed=seed, kernel_initializer=initializer) for seed in (1, 2)]
    for head in heads:
        head.build((None, 4))
    np.testing.assert_array_equal(*[head.branches["classes"].kernel.numpy() for head in heads])


def test_unseeded_heads_differ():
    heads = [DropMaxHead(3, kernel_initializer="zeros") for _ in range(2)]
    scores = [head(np.ones((2, 4), "float32"), training=True).numpy() for head in heads]
    assert not np.allclose(*scores)


def test_seeds_of_streams_and_branches_are_unrelated():
    """Not those of the same head, and not those of a head with a neighbouring seed."""
    drawn = []
    for seed in (0, 1, 2, -1, 2**70):
        head = DropMaxHead(3, posterior="label", seed=seed, retain=GLOROT)
        head.build((None, 4))
        drawn += [tuple(branch.kernel.numpy().ravel()) for branch in head.branches.values()]
        states = (head._train_seeds.state, head._predict_seeds.state)
        drawn += [tuple(state.numpy()) for state in states]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    "initializer",
    [
        "glorot_uniform",
        keras.initializers.GlorotUniform,
        {"class_name": "GlorotUniform", "config": {"seed": None}},
    ],
)
def test_initializers_without_a_seed_leave_the_global_stream_alone(initializer):
    state = random.getstate()
    settings = {"posterior": "label", "kernel_initializer": initializer}
    heads = [DropMaxHead(3, seed=5, **settings) for _ in range(2)]
    for head in heads:
        head.build((None, 4))
    assert random.getstate() == state
    np.testing.assert_array_equal(*(head.branches["classes"].kernel.numpy() for head in heads))
