"""The networks, and weights that a network starts from."""

import keras
import numpy as np
import pytest

from tf_dropmax.experiments import networks, train
from tf_dropmax.experiments.cli import main


@pytest.mark.parametrize("network", ["lenet", "tutorial_cnn"])
def test_networks(network, rng):
    x = rng.uniform(size=(2, 28, 28, 1)).astype("float32")
    build = getattr(networks, network)
    one, same, other = (build((28, 28, 1), seed, 1e-3) for seed in (1, 1, 2))
    # Counted by hand.
    parameters = {
        "lenet": 5 * 5 * 20 + 20 + 5 * 5 * 20 * 50 + 50 + 4 * 4 * 50 * 500 + 500,
        "tutorial_cnn": 5 * 5 * 32 + 32 + 5 * 5 * 32 * 64 + 64 + 7 * 7 * 64 * 1024 + 1024,
    }
    assert one.count_params() == parameters[network]
    np.testing.assert_array_equal(one(x), same(x))
    assert not np.allclose(one(x), other(x))
    kernels = [w.numpy() for w in one.weights if w.path.endswith("kernel")]
    for kernel in kernels:
        inputs, outputs = np.prod(kernel.shape[:-1]), kernel.shape[-1] * np.prod(kernel.shape[:-2])
        # Glorot's deviation; and 0.1, the deviation of the normal law before it is truncated.
        deviation = {"lenet": np.sqrt(2 / (inputs + outputs)), "tutorial_cnn": 0.1}[network]
        assert kernel.std() == pytest.approx(deviation, rel=0.15)
    biases = [w.numpy() for w in one.weights if w.path.endswith("bias")]
    start = np.float32({"lenet": 0, "tutorial_cnn": 0.1}[network])
    assert all((bias == start).all() for bias in biases)
    assert len(kernels) == len(biases) == 3
    squares = sum(float(np.sum(np.square(w.numpy()))) for w in one.weights)
    assert float(sum(one.losses)) == pytest.approx(1e-3 / 2 * squares, rel=1e-5)


def test_alexnet(rng):
    network = networks.alexnet((227, 227, 3), 1)
    sizes = [
        11 * 11 * 3 * 96 + 96,
        5 * 5 * 96 * 256 + 256,
        9 * 256 * 384 + 384,
        9 * 384 * 384 + 384,
        9 * 384 * 256 + 256,
    ]
    assert network.count_params() == sum(sizes) + (6 * 6 * 256 + 1) * 4096 + 4097 * 4096
    assert network(rng.integers(256, size=(1, 227, 227, 3), dtype="uint8")).shape == (1, 4096)


def test_weights_from_a_file(tmp_path, capsys):
    job = {"column": "digits", "protocol": "small", "iterations": 6, "seed": 0, "phase": "final"}
    job |= {"method": "base", "settings": {"l2": 0.0}}
    path = tmp_path / "start.weights.h5"
    losses = {}
    for seed in (0, 5):  # 0 is the seed of the job, whose weights change nothing.
        networks.mlp((8, 8, 1), seed).save_weights(path)
        losses[seed] = train.execute({**job, "weights": str(path)})["loss"]
    assert train.execute(job)["loss"] == losses[0] != losses[5]
    assert main(["table1", "--column", "digits", "--weights", str(tmp_path / "absent.h5")]) == 1
    assert "no file of weights" in capsys.readouterr().err


def test_resnet34(rng):
    x = rng.uniform(size=(2, 32, 32, 3)).astype("float32")
    one, other = (networks.resnet34((32, 32, 3), seed, 1e-4) for seed in (1, 2))
    convolutions = [layer for layer in one.layers if isinstance(layer, keras.layers.Conv2D)]
    # The head is the 34th layer.
    assert len([c for c in convolutions if c.kernel_size == (3, 3)]) == 33
    assert len(convolutions) == 33 + 3
    assert one.output_shape == (None, 512)
    blocks = [layer for layer in one.layers if isinstance(layer, keras.layers.Add)]
    heights = [block.output.shape[1] for block in blocks]
    assert heights == [32] * 3 + [16] * 4 + [8] * 6 + [4] * 3
    kernels = [c.kernel.numpy().ravel()[:50] for c in convolutions]
    assert len({tuple(k) for k in kernels}) == len(kernels)
    assert not np.allclose(one(x), other(x))
