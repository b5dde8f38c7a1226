"""Data sets and their splits."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_dropmax.experiments.console import UserError

FOLDER_VARIABLE = "TF_DROPMAX_DATA"

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


def find(name: str) -> Path | None:
    """The path of a local file or folder.

    Args:
        name: String, its name without folders.

    Returns:
        The path with the fewest parts in or below the folder that `TF_DROPMAX_DATA` names. `None`
        if there is none or the variable is not set.

    Raises:
        UserError: If `TF_DROPMAX_DATA` names no folder.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise UserError(f"{FOLDER_VARIABLE} names {folder}, which is not a folder.")
    return min(Path(folder).rglob(name), key=lambda path: (len(path.parts), path), default=None)


def _missing(name: str) -> str:
    """A sentence that says why `find(name)` returned `None`."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        return f"There is no {name} in or below {folder}, the folder that {FOLDER_VARIABLE} names."
    return f"{FOLDER_VARIABLE} is not set. It should name a folder with {name} in or below it."


def _local(name: str) -> Path:
    """The path of a file or folder that cannot be downloaded."""
    path = find(name)
    if path is None:
        raise UserError(_missing(name))
    return path


def _arrays(path: Path, **shapes: tuple[int | None, ...]) -> Any:
    """Arrays of a NumPy archive.

    Args:
        path: Path of the archive.
        **shapes: The expected shapes by the names of the arrays. `None` is any size.

    Raises:
        UserError: If the file is not an archive with such arrays.
    """
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            arrays = {name: file[name] for name in shapes}
    except Exception as error:  # The exception depends on where the archive is broken.
        raise UserError(f"{path} has no arrays {', '.join(shapes)} ({_line(error)}).") from error
    for name, shape in shapes.items():
        found = arrays[name].shape
        sizes = zip(found, shape, strict=False)
        if len(found) != len(shape) or any(size not in (None, is_) for is_, size in sizes):
            raise UserError(f"{path}: expected {name} of shape {shape}. Received: {found}.")
    return list(arrays.values())


def _line(error: Exception) -> str:
    """The first line of the message of an exception, or the name of its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _download(source: ModuleType, hint: str) -> tuple[Part, Part]:
    """The data set of a module of `keras.datasets`."""
    try:
        return source.load_data()
    except Exception as error:
        name = source.__name__.rpartition(".")[2]
        raise UserError(f"{name} could not be downloaded ({_line(error)}). {hint}") from error


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
        (x, y), (x_test, y_test) = _download(keras.datasets.mnist, _missing("mnist.npz"))
    else:
        x, y = _arrays(path, x_train=(None, 28, 28), y_train=(None,))
        x_test, y_test = _arrays(path, x_test=(None, 28, 28), y_test=(None,))
    return Dataset(_grey(x), _labels(y), _grey(x_test), _labels(y_test))


def _grey(x):
    return (x[..., None] / 255).astype("float32")


def _labels(y):
    return y.reshape(-1).astype("int64")


def omniglot242() -> Dataset:
    """Handwritten characters from a local `omniglot242.npz`: 242 classes.

    Each class has 20 images of 28 x 28 pixels, of which 5 are test images.
    """
    path = _local("omniglot242.npz")
    x, y = _arrays(path, x=(4840, 28, 28), y=(4840,))
    return hold_out(Dataset(_grey(x), _labels(y)), 5)


def omniglot968() -> Dataset:
    """Omniglot-242, turned by 0, 90, 180 and 270 degrees: 4 times 242 classes."""
    dataset = omniglot242()

    def turned(x, y):
        images = [np.rot90(x, turn, axes=(1, 2)) for turn in range(4)]
        labels = [y + turn * dataset.classes for turn in range(4)]
        return np.concatenate(images), np.concatenate(labels)

    return Dataset(*turned(dataset.x, dataset.y), *turned(dataset.x_test, dataset.y_test))


def banking77() -> Dataset:
    """10,003 + 3,080 questions to a bank as embeddings `(N, 384)`: 77 intents.

    Casanueva et al. 2020, CC BY 4.0. The embeddings are those of all-MiniLM-L6-v2, scaled to unit
    variance, from a local `banking77.npz`.
    """
    return Dataset(*_questions("banking77.npz", ""), *_questions("banking77.npz", "_test"))


def clinc150() -> Dataset:
    """18,000 + 4,500 questions to an assistant as embeddings `(N, 384)`: 150 intents.

    Larson et al. 2019, CC BY 3.0. 1,000 questions more are out of scope. The embeddings are as
    for `banking77`, from a local `clinc150.npz`. Its validation set is part of the 18,000.
    """
    file = "clinc150.npz"
    (x, y), (x_val, y_val) = _questions(file, ""), _questions(file, "_val")
    (x_out_of_scope,) = _arrays(_local(file), x_oos_test=(None, None))
    return Dataset(
        np.concatenate([x, x_val]),
        np.concatenate([y, y_val]),
        *_questions(file, "_test"),
        _embeddings(x_out_of_scope),
    )


def _questions(file: str, part: str) -> Part:
    x, y = _arrays(_local(file), **{f"x{part}": (None, None), f"y{part}": (None,)})
    return _embeddings(x), _labels(y)


def _embeddings(x):
    # A unit vector has the variance 1 / width.
    return x.astype("float32") * np.float32(np.sqrt(x.shape[1]))


def cifar10() -> Dataset:
    """50,000 + 10,000 photographs of 32 x 32 pixels in 10 classes, from `keras.datasets`."""
    return _cifar(keras.datasets.cifar10)


def cifar100() -> Dataset:
    """50,000 + 10,000 photographs of 32 x 32 pixels in 100 classes, from `keras.datasets`."""
    return _cifar(keras.datasets.cifar100)


def _cifar(source):
    (x, y), (x_test, y_test) = _download(source, "`keras.datasets` needs the network once.")
    return Dataset(_photographs(x), _labels(y), _photographs(x_test), _labels(y_test))


def _photographs(x):
    return (x / np.float32(255)).astype("float32")


def cifar10_jpeg() -> Dataset:
    """The same photographs as JPEG, which loses some detail, from a local `cifar10_jpeg.npz`."""
    path = _local("cifar10_jpeg.npz")
    content, offsets, y, test = _arrays(
        path, bytes=(None,), offsets=(None,), y=(None,), test=(None,)
    )
    parts = itertools.pairwise(offsets)
    try:
        images = [tf.io.decode_jpeg(content[a:b].tobytes(), channels=3).numpy() for a, b in parts]
    except tf.errors.InvalidArgumentError as error:
        raise UserError(f"{path} has an image that cannot be decoded ({_line(error)}).") from error
    x, y, test = _photographs(np.stack(images)), _labels(y), test.astype(bool)
    return Dataset(x[~test], y[~test], x[test], y[test])


LOADERS: dict[str, Callable[[], Dataset]] = {
    loader.__name__: loader
    for loader in (
        *(digits, mnist, omniglot242, omniglot968, banking77, clinc150),
        *(cifar10, cifar10_jpeg, cifar100),
    )
}


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
    """
    order = np.random.default_rng(seed).permutation(len(dataset.y))

    def part(indices):
        return dataset.x[indices], dataset.y[indices]

    if train_per_class is None:
        train, others = order[validation:], order[:validation]
    else:
        train = _first_of_each_class(dataset, order, train_per_class)
        others = order[~np.isin(order, train)]
    test = part(others[validation:])
    if dataset.x_test is not None and dataset.y_test is not None:
        test = dataset.x_test, dataset.y_test
    return Split(part(train), part(others[:validation]), test)
