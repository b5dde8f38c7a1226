"""Data sets and their splits."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dropmax.experiments import data
from tf_dropmax.experiments.__main__ import main
from tf_dropmax.experiments.console import UserError


def test_splits_do_not_overlap_and_follow_the_seed():
    digits = data.digits()
    split = data.split(digits, 20, validation=100, seed=3)
    assert [len(part[1]) for part in split] == [200, 100, 1497]
    np.testing.assert_array_equal(np.bincount(split.train[1]), np.full(10, 20))
    numbered = digits._replace(x=np.arange(len(digits.y)))
    parts = [set(x) for x, _ in data.split(numbered, 20, validation=100, seed=3)]
    assert set.union(*parts) == set(range(1797))
    assert sum(map(len, parts)) == 1797
    again, other = data.split(numbered, 20, 100, seed=3), data.split(numbered, 20, 100, seed=4)
    assert [set(x) for x, _ in again] == parts
    assert set(other.train[0]) != parts[0]
    for x, y in split:
        for index in range(5):
            assert digits.y[np.flatnonzero((digits.x == x[index]).all((1, 2, 3)))[0]] == y[index]


def test_a_split_without_a_number_takes_all_examples():
    dataset = data.Dataset(np.arange(100), np.arange(100) % 5, np.arange(7), np.zeros(7, "int64"))
    split = data.split(dataset, None, 30, seed=1)
    assert len(split.validation[0]) == 30
    assert set(split.train[0]) | set(split.validation[0]) == set(range(100))
    assert len(split.train[0]) == 70
    assert split.test[0] is dataset.x_test


@pytest.fixture
def mnist_file(tmp_path, monkeypatch):
    """A small file in the format of the real one."""
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    (tmp_path / "below").mkdir()
    y = np.arange(60) % 10
    x = np.broadcast_to(25 * y[:, None, None], (60, 28, 28)).astype("uint8")
    path = tmp_path / "below" / "mnist.npz"
    np.savez(path, x_train=x, y_train=y.astype("uint8"), x_test=x[:20], y_test=y[:20])
    return path


def test_mnist_from_a_local_file(mnist_file):
    dataset = data.mnist()
    assert (dataset.x.shape, dataset.x_test.shape) == ((60, 28, 28, 1), (20, 28, 28, 1))
    assert (dataset.x.dtype, dataset.y.dtype, dataset.classes) == ("float32", "int64", 10)
    np.testing.assert_allclose(dataset.x[:, 3, 3, 0], 25 * dataset.y / 255, rtol=1e-6)
    assert data.split(dataset, 5).test[0] is dataset.x_test


@pytest.mark.parametrize("content", ["text", "cut", "npy", "keys", "shape", "one-hot"])
def test_a_broken_file_is_one_line(mnist_file, tmp_path, capsys, content):
    if content == "text":
        mnist_file.write_text("not an archive")
    elif content == "cut":
        mnist_file.write_bytes(mnist_file.read_bytes()[:5000])
    elif content == "npy":
        with mnist_file.open("wb") as stream:
            np.save(stream, np.zeros(3))
    else:
        with np.load(mnist_file) as file:
            arrays = dict(file)
        arrays |= {
            "keys": {"x_test": None},
            "shape": {"x_train": np.zeros((2, 3))},
            "one-hot": {"y_train": np.eye(10)[arrays["y_train"]]},
        }[content]
        np.savez(mnist_file, **{key: x for key, x in arrays.items() if x is not None})
    assert main(["demo", "--dataset", "mnist", "--output", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert str(mnist_file) in message
    assert message.count("\n") == 1


def test_a_missing_file_is_one_line(tmp_path, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise Exception("URL fetch failure\nand more lines")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", no_network)

    def message():
        assert main(["demo", "--dataset", "mnist", "--output", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err

    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    assert f"There is no mnist.npz in or below {tmp_path}" in message()
    monkeypatch.delenv("TF_DROPMAX_DATA")
    assert "mnist could not be downloaded (URL fetch failure)" in message()
    assert "TF_DROPMAX_DATA is not set" in message()
    assert message().count("\n") == 1
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path / "absent"))
    assert "not a folder" in message()


def test_omniglot(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    number = np.arange(4840)
    x = np.zeros((4840, 28, 28), "uint8")
    x[:, 0, 0], x[:, 0, 1] = number % 256, number // 256
    path = tmp_path / "omniglot242.npz"
    np.savez_compressed(path, x=x, y=number // 20, names=np.array(["a"] * 242))

    def numbers(images):
        images = np.round(255 * images)
        return set((images[:, 0, 0, 0] + 256 * images[:, 0, 1, 0]).astype(int))

    dataset = data.omniglot242()
    assert dataset.classes == 242
    np.testing.assert_array_equal(np.bincount(dataset.y_test), np.full(242, 5))
    search, final = data.split(dataset, 12, 726, seed=1), data.split(dataset, 15, seed=2)
    test = numbers(final.test[0])
    assert numbers(search.test[0]) == test
    assert numbers(final.train[0]) == set(number) - test
    assert not numbers(search.validation[0]) & (test | numbers(search.train[0]))

    turned = data.omniglot968()
    assert turned.classes == 968
    np.testing.assert_array_equal(np.bincount(turned.y_test), np.full(968, 5))
    corners = [((0, 0), (0, 1)), ((-1, 0), (-2, 0)), ((-1, -1), (-1, -2)), ((0, -1), (1, -1))]
    for turn, (low, high) in enumerate(corners):
        chosen = turned.y_test // 242 == turn
        images = np.round(255 * turned.x_test[chosen])
        found = (images[:, low[0], low[1], 0] + 256 * images[:, high[0], high[1], 0]).astype(int)
        assert set(found) == test  # Every turn has the same test drawings.
        np.testing.assert_array_equal(found // 20, turned.y_test[chosen] % 242)

    np.savez_compressed(path, x=x[:100], y=number[:100] // 20)
    with pytest.raises(UserError, match=r"expected x of shape \(4840, 28, 28\)"):
        data.omniglot242()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, rng, monkeypatch):
    images = rng.integers(256, size=(24, 32, 32, 3), dtype="uint8")
    classes = np.arange(24)[:, None] % 10
    parts = (images, classes), (images[:3], classes[:3])
    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", lambda: parts)
    dataset = data.LOADERS[name]()
    np.testing.assert_allclose(dataset.x * 255, images, atol=1e-4)
    np.testing.assert_array_equal(dataset.y, np.arange(24) % 10)
    np.testing.assert_array_equal(dataset.y_test, [0, 1, 2])
    assert dataset.x_test.dtype == "float32"

    def no_network():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", no_network)
    with pytest.raises(UserError, match=f"{name} could not be downloaded"):
        data.LOADERS[name]()


def test_embeddings(tmp_path, monkeypatch, rng):
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    for name in ("banking77", "clinc150"):
        with pytest.raises(UserError, match=f"no {name}.npz"):
            data.LOADERS[name]()
    x = rng.normal(size=(40, 16))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("float16")
    y = np.arange(40) % 5
    parts = {"x": x[:20], "x_val": x[20:25], "x_test": x[25:35], "x_oos_test": x[35:]}
    labels = {"y": y[:20], "y_val": y[20:25], "y_test": y[25:35]}
    for name in ("banking77", "clinc150"):
        np.savez(tmp_path / f"{name}.npz", **parts, **labels)
    banking, clinc = data.banking77(), data.clinc150()
    assert (len(banking.y), len(clinc.y), banking.x_out_of_scope) == (20, 25, None)
    np.testing.assert_array_equal(clinc.y, y[:25])
    for found, expected in ((clinc.x, x[:25]), (clinc.x_test, x[25:35])):
        assert found.dtype == "float32"
        np.testing.assert_allclose(found, 4 * expected.astype("float32"))
    np.testing.assert_allclose(clinc.x_out_of_scope.var(axis=1), 1, atol=0.2)
    np.savez(tmp_path / "banking77.npz", **{**parts, "x_test": y}, **labels)
    with pytest.raises(UserError, match=r"expected x_test of shape .* Received: \(40,\)"):
        data.banking77()


def test_cifar_from_jpeg(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"no cifar10_jpeg\.npz"):
        data.cifar10_jpeg()
    shades = np.array([0, 60, 120, 180, 240], "uint8")
    files = [
        tf.io.encode_jpeg(np.full((32, 32, 3), shade, "uint8"), quality=95).numpy()
        for shade in shades
    ]
    arrays = {
        "bytes": np.frombuffer(b"".join(files), "uint8"),
        "offsets": np.cumsum([0, *map(len, files)]),
        "y": np.arange(5).astype("uint8"),
        "test": np.array([False, True, False, False, True]),
    }
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    dataset = data.cifar10_jpeg()
    assert dataset.x.shape == (3, 32, 32, 3)
    np.testing.assert_allclose(255 * dataset.x[:, 5, 5, 0], shades[[0, 2, 3]], atol=2)
    np.testing.assert_allclose(255 * dataset.x_test[:, 5, 5, 2], shades[[1, 4]], atol=2)
    assert (dataset.y.tolist(), dataset.y_test.tolist()) == ([0, 2, 3], [1, 4])
    np.savez(tmp_path / "cifar10_jpeg.npz", **{**arrays, "bytes": arrays["bytes"][::-1].copy()})
    with pytest.raises(UserError, match="cannot be decoded"):
        data.cifar10_jpeg()
