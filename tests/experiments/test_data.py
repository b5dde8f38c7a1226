"""Data sets and their splits."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dropmax.experiments import data, files
from tf_dropmax.experiments.errors import UserError


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
    with pytest.raises(UserError, match="at least 200 examples of each class"):
        data.split(digits, 200)


def test_a_split_without_a_number_takes_all_examples():
    dataset = data.Dataset(np.arange(100), np.arange(100) % 5, np.arange(7), np.zeros(7, "int64"))
    split = data.split(dataset, None, 30, seed=1)
    assert len(split.validation[0]) == 30
    assert set(split.train[0]) | set(split.validation[0]) == set(range(100))
    assert len(split.train[0]) == 70
    assert split.test[0] is dataset.x_test


def test_fours_and_nines(tmp_path, monkeypatch):
    y = np.arange(60) % 10
    x = np.broadcast_to(y[:, None, None], (60, 28, 28)).astype("uint8")
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    dataset = data.mnist49()
    assert (len(dataset.y), len(dataset.y_test), dataset.classes) == (12, 4, 2)
    for images, labels in [(dataset.x, dataset.y), (dataset.x_test, dataset.y_test)]:
        np.testing.assert_array_equal(
            np.round(255 * images[:, 0, 0, 0]), np.where(labels == 1, 9, 4)
        )


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
    with pytest.raises(UserError, match="242 classes of 20 images"):
        data.omniglot242()


@pytest.mark.parametrize(("name", "labels"), [("cifar10", 1), ("cifar100", 2)])
def test_cifar_from_the_binary_version(name, labels, rng, tmp_path, monkeypatch):
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    train_names = [f"data_batch_{i}.bin" for i in range(1, 6)] if labels == 1 else ["train.bin"]
    images = rng.integers(256, size=(24, 32, 32, 3), dtype="uint8")
    classes = np.arange(24) % 10
    for number, file in enumerate([*train_names, "test.bin" if labels == 2 else "test_batch.bin"]):
        part = slice(4 * number, 4 * number + 4)
        planes = images[part].transpose(0, 3, 1, 2).reshape(4, -1)
        coarse = np.full((4, labels - 1), 99, "uint8")
        records = np.concatenate([coarse, classes[part, None].astype("uint8"), planes], axis=1)
        records.tofile(tmp_path / file)
    dataset = data.LOADERS[name]()
    count = 4 * len(train_names)
    np.testing.assert_allclose(dataset.x * 255, images[:count], atol=1e-4)
    np.testing.assert_array_equal(dataset.y, classes[:count])
    np.testing.assert_allclose(dataset.x_test * 255, images[count : count + 4], atol=1e-4)
    np.testing.assert_array_equal(dataset.y_test, classes[count : count + 4])
    (tmp_path / train_names[0]).write_bytes(b"short")
    with pytest.raises(UserError, match=f"{train_names[0]} is not a file of CIFAR"):
        data.LOADERS[name]()
    (tmp_path / train_names[0]).unlink()

    def no_network():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", no_network)
    with pytest.raises(UserError, match=f"no {train_names[0]}"):
        data.LOADERS[name]()
    parts = (images, classes[:, None]), (images[:3], classes[:3, None])
    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", lambda: parts)
    dataset = data.LOADERS[name]()
    assert dataset.x.dtype == "float32"
    assert dataset.y.shape == (24,)
    np.testing.assert_array_equal(dataset.y_test, classes[:3])


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
    with pytest.raises(UserError, match=r"found x_test: int64 \(40,\)"):
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


def test_image_folders_and_awa2(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    with pytest.raises(UserError, match=f"no JPEGImages in or below {tmp_path}"):
        data.awa2()
    folder = tmp_path / "Animals_with_Attributes2" / "JPEGImages"
    for name, colour, count in [("zebra", 250, 7), ("antelope", 10, 5)]:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = np.full((40, 60, 3), colour, "uint8")
            keras.utils.save_img(folder / name / f"{name}_{number}.jpg", image, scale=False)
    (folder / "zebra" / "notes.txt").write_text("not an image")
    x, y = files.read_image_folders(folder, (20, 30))
    assert (x.shape, x.dtype) == ((12, 20, 30, 3), "uint8")
    np.testing.assert_array_equal(y, [0] * 5 + [1] * 7)
    assert abs(x[y == 0].astype(int) - 10).max() < 5
    assert abs(x[y == 1].astype(int) - 250).max() < 5
    dataset = data.awa2()
    assert dataset.x.shape[1:] == (227, 227, 3)
    np.testing.assert_array_equal(np.bincount(dataset.y_test), [1, 1])
    assert len(dataset.y) == 10
    (folder / "zebra" / "broken.png").write_bytes(b"PNG?")
    with pytest.raises(UserError, match=r"broken\.png cannot be read as an image"):
        files.read_image_folders(folder)
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images"):
        files.read_image_folders(folder)
    with pytest.raises(UserError, match=r"two or more folders, .*It has 0"):
        files.read_image_folders(folder / "empty")


def test_a_required_data_set_is_downloaded_but_local_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_DROPMAX_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"no omniglot242\.npz"):
        data.require("omniglot968")
    x, y = np.zeros((2, 28, 28), "uint8"), np.array([4, 9])
    downloads = []
    parts = (x, y), (x, y)
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: downloads.append(1) or parts)
    data.require("mnist49")
    assert len(downloads) == 1
    for name in ("mnist.npz", "omniglot242.npz"):
        (tmp_path / name).write_text("not an archive")
    data.require("mnist49")
    data.require("omniglot968")
    assert len(downloads) == 1
    assert data.FILES.keys() == data.LOADERS.keys()
