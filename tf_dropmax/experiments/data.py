"""Data sets and their splits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax.experiments.errors import UserError
from tf_dropmax.experiments.files import (
    find,
    first_line,
    missing,
    read_arrays,
    read_image_folders,
)

Part = tuple[np.ndarray, np.ndarray]


class Dataset(NamedTuple):
    """Images or embeddings, and labels.

    Attributes:
        x: Array `(N, height, width, channels)`, float32 in [0, 1] unless the loader says otherwise.
        y: Array `(N,)`, int64.
        x_test, y_test: The test set in the same form, or `None` if the data set has none.
        x_out_of_scope: Test examples of no class, or `None` if the data set has none.
    """

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    x_out_of_scope: np.ndarray | None = None

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1


class Split(NamedTuple):
    """Disjoint parts of a `Dataset`, each a pair `(x, y)`."""

    train: Part
    validation: Part
    test: Part


def digits() -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels, which scikit-learn contains."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return Dataset((bunch.images[..., None] / 16).astype("float32"), bunch.target.astype("int64"))


def mnist() -> Dataset:
    """60,000 + 10,000 handwritten digits of 28 x 28 pixels.

    They come from a local `mnist.npz` if there is one, and from `keras.datasets` otherwise.
    """
    path = find("mnist.npz")
    if path is None:
        (x, y), (x_test, y_test) = _download(keras.datasets.mnist, "MNIST", FILES["mnist"])
    else:
        x, y, x_test, y_test = read_arrays(path, "x_train", "y_train", "x_test", "y_test")
        for images, labels in [(x, y), (x_test, y_test)]:
            _check_mnist(path, images, labels)
    return Dataset(_scaled(x), y.astype("int64"), _scaled(x_test), y_test.astype("int64"))


def _local(title: str, name: str) -> Path:
    """The path of a file that cannot be downloaded."""
    path = find(name)
    if path is None:
        raise UserError(f"{title} cannot be read: {missing(name)}.")
    return path


def _check_mnist(path, images, labels):
    fits = images.shape == (*labels.shape, 28, 28) and labels.ndim == 1
    if not fits or labels.dtype.kind not in "iu" or not np.isin(labels, range(10)).all():
        raise UserError(
            f"{path} is not MNIST: expected images (N, 28, 28) and whole-number labels (N,) from 0 "
            f"to 9, found {images.dtype} {images.shape} and {labels.dtype} {labels.shape}."
        )


def _download(source: ModuleType, title: str, names: Sequence[str]) -> tuple[Part, Part]:
    try:
        return source.load_data()
    except Exception as error:
        absent = next(name for name in names if find(name) is None)
        raise UserError(
            f"{title} could not be downloaded ({first_line(error)}), and {missing(absent)}. "
            f"A local copy of {title} consists of {', '.join(names)}."
        ) from error


def _scaled(x):
    return (x[..., None] / 255).astype("float32")


def mnist49() -> Dataset:
    """The fours and nines of MNIST, the two classes that are most alike: 2 classes."""
    dataset = mnist()

    def chosen(x, y):
        kept = np.isin(y, (4, 9))
        return x[kept], (y[kept] == 9).astype("int64")

    return Dataset(*chosen(dataset.x, dataset.y), *chosen(dataset.x_test, dataset.y_test))


def omniglot242() -> Dataset:
    """Handwritten characters from a local `omniglot242.npz`: 242 classes.

    Each class has 20 images of 28 x 28 pixels, of which 5 are test images.
    """
    path = _local("Omniglot-242", "omniglot242.npz")
    x, y = read_arrays(path, "x", "y")
    fits = x.shape == (4840, 28, 28) and y.shape == (4840,)
    if not fits or (np.bincount(y, minlength=242) != 20).any():
        raise UserError(
            f"{path} does not hold 242 classes of 20 images (28, 28): found {x.dtype} {x.shape} "
            f"and {y.dtype} {y.shape}."
        )
    return hold_out(Dataset(_scaled(x), y.astype("int64")), 5)


def omniglot968() -> Dataset:
    """Omniglot-242, turned by 0, 90, 180 and 270 degrees: 4 times 242 classes."""
    dataset = omniglot242()

    def turned(x, y):
        images = [np.rot90(x, turn, axes=(1, 2)) for turn in range(4)]
        return np.concatenate(images), np.concatenate(
            [y + turn * dataset.classes for turn in range(4)]
        )

    return Dataset(*turned(dataset.x, dataset.y), *turned(dataset.x_test, dataset.y_test))


def banking77() -> Dataset:
    """10,003 + 3,080 questions to a bank as embeddings `(N, 384)`: 77 intents.

    Casanueva et al. 2020, CC BY 4.0. The embeddings are those of all-MiniLM-L6-v2, scaled to unit
    variance, from a local `banking77.npz`.
    """
    x, y, x_test, y_test = _embeddings("banking77.npz", "x", "y", "x_test", "y_test")
    return Dataset(x, y, x_test, y_test)


def clinc150() -> Dataset:
    """18,000 + 4,500 questions to an assistant as embeddings `(N, 384)`: 150 intents.

    Larson et al. 2019, CC BY 3.0. 1,000 questions more are out of scope. The embeddings are as
    for `banking77`, from a local `clinc150.npz`. Its validation set is part of the 18,000.
    """
    names = ("x", "y", "x_val", "y_val", "x_test", "y_test", "x_oos_test")
    x, y, x_val, y_val, x_test, y_test, x_oos = _embeddings("clinc150.npz", *names)
    return Dataset(np.concatenate([x, x_val]), np.concatenate([y, y_val]), x_test, y_test, x_oos)


def _embeddings(file: str, *names: str) -> list[np.ndarray]:
    path = _local("The embeddings", file)
    arrays = dict(zip(names, read_arrays(path, *names), strict=True))
    for name, array in arrays.items():
        is_label = name.startswith("y")
        ndim, kinds = (1, "iu") if is_label else (2, "f")
        if array.ndim != ndim or array.dtype.kind not in kinds:
            raise UserError(
                f"{path} holds no embeddings: expected numbers (N, width) and whole-number labels "
                f"(N,), found {name}: {array.dtype} {array.shape}."
            )
        if is_label:
            arrays[name] = array.astype("int64")
        else:  # A unit vector has the variance 1 / width.
            arrays[name] = array.astype("float32") * np.float32(np.sqrt(array.shape[1]))
    return list(arrays.values())


def cifar10() -> Dataset:
    """50,000 + 10,000 photographs of 32 x 32 pixels in 10 classes; see `_cifar`."""
    return _cifar(keras.datasets.cifar10, FILES["cifar10"], label_bytes=1)


def cifar10_jpeg() -> Dataset:
    """The same photographs as JPEG, which loses some detail, from a local `cifar10_jpeg.npz`."""
    path = _local("The photographs", "cifar10_jpeg.npz")
    content, offsets, y, test = read_arrays(path, "bytes", "offsets", "y", "test")
    try:
        images = np.stack(
            [
                tf.io.decode_jpeg(content[start:end].tobytes(), channels=3).numpy()
                for start, end in itertools.pairwise(offsets)
            ]
        )
    except tf.errors.InvalidArgumentError as error:
        raise UserError(
            f"{path} holds an image that cannot be decoded ({first_line(error)})."
        ) from error
    x, y, test = _photographs(images), _labels(y), test.astype(bool)
    return Dataset(x[~test], y[~test], x[test], y[test])


def cifar100() -> Dataset:
    """50,000 + 10,000 photographs of 32 x 32 pixels in 100 classes; see `_cifar`."""
    return _cifar(keras.datasets.cifar100, FILES["cifar100"], label_bytes=2)


def _cifar(source: ModuleType, names: Sequence[str], label_bytes: int) -> Dataset:
    """CIFAR from the files of its binary version if they are there, else from `keras.datasets`.

    A record of the binary version is `label_bytes` bytes, of which the last is the class, and
    3 x 32 x 32 bytes of pixels. The Python version consists of pickles, which can run any code.

    Args:
        source: Module of `keras.datasets`.
        names: Names of the files. The last has the test set.
        label_bytes: Int.
    """
    paths = [path for name in names if (path := find(name)) is not None]
    if len(paths) < len(names):
        parts = _download(source, "CIFAR", names)
        return Dataset(*(array for x, y in parts for array in (_photographs(x), _labels(y))))
    size = label_bytes + 3 * 32 * 32
    records = []
    for path in paths:
        content = np.frombuffer(path.read_bytes(), "uint8")
        if len(content) == 0 or len(content) % size:
            raise UserError(
                f"{path} is not a file of CIFAR's binary version: expected records of {size} "
                f"bytes, found {len(content)} bytes."
            )
        records.append(content.reshape(-1, size))
    arrays = []
    for part in (np.concatenate(records[:-1]), records[-1]):
        planes = part[:, label_bytes:].reshape(-1, 3, 32, 32)
        arrays += [_photographs(planes.transpose(0, 2, 3, 1)), _labels(part[:, label_bytes - 1])]
    return Dataset(*arrays)


def _photographs(x):
    return (x / np.float32(255)).astype("float32")


def _labels(y):
    return y.reshape(-1).astype("int64")


def awa2() -> Dataset:
    """Animals with Attributes 2, from a local folder `JPEGImages`.

    37,322 photographs of 50 animals, uint8 from 0 to 255. Every class has the same number of test
    images, a fifth of the smallest class.
    """
    folder = find("JPEGImages")
    if folder is None:
        raise UserError(
            f"Animals with Attributes 2 cannot be read: {missing('JPEGImages')}. The data set "
            "contains this folder."
        )
    dataset = Dataset(*read_image_folders(folder))
    return hold_out(dataset, int(np.bincount(dataset.y).min()) // 5)


LOADERS: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "mnist": mnist,
    "mnist49": mnist49,
    "omniglot242": omniglot242,
    "omniglot968": omniglot968,
    "banking77": banking77,
    "clinc150": clinc150,
    "cifar10": cifar10,
    "cifar10_jpeg": cifar10_jpeg,
    "cifar100": cifar100,
    "awa2": awa2,
}
FILES: dict[str, tuple[str, ...]] = {
    "digits": (),
    "mnist": ("mnist.npz",),
    "mnist49": ("mnist.npz",),
    "omniglot242": ("omniglot242.npz",),
    "omniglot968": ("omniglot242.npz",),
    "banking77": ("banking77.npz",),
    "clinc150": ("clinc150.npz",),
    "cifar10_jpeg": ("cifar10_jpeg.npz",),
    "cifar10": (*(f"data_batch_{part}.bin" for part in range(1, 6)), "test_batch.bin"),
    "cifar100": ("train.bin", "test.bin"),
    "awa2": ("JPEGImages",),
}


def require(name: str) -> None:
    """Makes sure that a data set can be loaded, without reading its local files.

    If a file is missing, this downloads the data set or raises the error of its loader.

    Args:
        name: A key of `LOADERS`.

    Raises:
        UserError: If a file is missing and cannot be downloaded.
    """
    if None in map(find, FILES[name]):
        LOADERS[name]()


def hold_out(dataset: Dataset, per_class: int) -> Dataset:
    """Makes some examples of each class, always the same, the test set."""
    order = np.random.default_rng(0).permutation(len(dataset.y))
    test = _first_of_each_class(dataset, order, per_class)
    rest = np.setdiff1d(order, test)
    return Dataset(dataset.x[rest], dataset.y[rest], dataset.x[test], dataset.y[test])


def _first_of_each_class(dataset, order, count):
    of_class = (order[dataset.y[order] == label] for label in range(dataset.classes))
    return np.concatenate([indices[:count] for indices in of_class])


def split(
    dataset: Dataset, train_per_class: int | None, validation: int = 0, seed: int = 0
) -> Split:
    """Draws a training and a validation set.

    The test set is that of the data set. If it has none, the test set is the remaining examples.

    Args:
        dataset: A `Dataset`.
        train_per_class: Positive int, number of training examples of each class. `None` trains on
            all but the validation set.
        validation: Non-negative int, number of validation examples, of any class. Defaults to 0.
        seed: Int. The same seed gives the same split. Defaults to 0.

    Returns:
        A `Split`. Its parts do not overlap.

    Raises:
        UserError: If there are too few examples.
    """
    counts = np.bincount(dataset.y, minlength=dataset.classes)
    order = np.random.default_rng(seed).permutation(len(dataset.y))

    def part(indices):
        return dataset.x[indices], dataset.y[indices]

    def test_or(indices):
        if dataset.x_test is None or dataset.y_test is None:
            return part(indices)
        return dataset.x_test, dataset.y_test

    if train_per_class is None:
        return Split(part(order[validation:]), part(order[:validation]), test_or(order[:0]))
    needed = train_per_class * dataset.classes + validation
    if counts.min() < train_per_class or counts.sum() < needed:
        raise UserError(
            f"Expected at least {train_per_class} examples of each class and {validation} more. "
            f"The smallest class has {counts.min()}, all classes together have {counts.sum()}."
        )
    train = _first_of_each_class(dataset, order, train_per_class)
    others = order[~np.isin(order, train)]
    return Split(part(train), part(others[:validation]), test_or(others[validation:]))
