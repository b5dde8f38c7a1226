"""Data sets and their splits."""

import os
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

from tf_dropmax.experiments.errors import UserError

FOLDER_VARIABLE = "TF_DROPMAX_DATA"


class Dataset(NamedTuple):
    """Images `x` `(N, height, width, channels)`, float32 in [0, 1]; labels `y` `(N,)`, int64. Test sets may be `None`."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None

    @property
    def classes(self):
        return int(self.y.max()) + 1


class Split(NamedTuple):
    """Disjoint parts of a `Dataset`, each a pair `(x, y)`."""

    train: tuple
    validation: tuple
    test: tuple


def digits():
    """1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return Dataset((bunch.images[..., None] / 16).astype("float32"), bunch.target.astype("int64"))


def mnist():
    """60,000 + 10,000 handwritten digits of 28 x 28 pixels: a local `mnist.npz` if there is one, else `keras.datasets`."""
    path = find("mnist.npz")
    if path is None:
        try:
            (x, y), (x_test, y_test) = keras.datasets.mnist.load_data()
        except Exception as error:
            raise UserError(
                f"MNIST could not be downloaded ({_first_line(error)}), and {missing('mnist.npz')}; "
                "the file is the one that keras.datasets.mnist uses."
            ) from error
    else:
        x, y, x_test, y_test = arrays = _arrays(path, "x_train", "y_train", "x_test", "y_test")
        for images, labels in [(x, y), (x_test, y_test)]:
            fits = images.shape == (*labels.shape, 28, 28) and labels.ndim == 1 and labels.dtype.kind in "iu"
            if not fits or not np.isin(labels, range(10)).all():
                shapes = ", ".join(f"{array.dtype} {array.shape}" for array in arrays)
                raise UserError(
                    f"{path} does not hold MNIST: expected images (N, 28, 28) and whole-number labels (N,) from 0 to 9, twice; "
                    f"found {shapes}."
                )
    return Dataset(_images(x), y.astype("int64"), _images(x_test), y_test.astype("int64"))


def _images(x):
    return (x[..., None] / 255).astype("float32")


def omniglot242():
    """Handwritten characters, 242 classes of 20 images of 28 x 28 pixels, from a local `omniglot242.npz`; 5 a class to test."""
    path = find("omniglot242.npz")
    if path is None:
        raise UserError(f"Omniglot-242 cannot be read: {missing('omniglot242.npz')}.")
    x, y = _arrays(path, "x", "y")
    if x.shape != (4840, 28, 28) or y.shape != (4840,) or (np.bincount(y, minlength=242) != 20).any():
        raise UserError(
            f"{path} does not hold 242 classes of 20 images (28, 28): found {x.dtype} {x.shape}, {y.dtype} {y.shape}."
        )
    return hold_out(Dataset(_images(x), y.astype("int64")), 5)


def omniglot968():
    """Omniglot-242 and its characters turned by 90, 180 and 270 degrees, as classes of their own: 968 classes."""
    dataset = omniglot242()

    def turned(x, y):
        return np.concatenate([np.rot90(x, turn, axes=(1, 2)) for turn in range(4)]), np.concatenate(
            [y + turn * dataset.classes for turn in range(4)]
        )

    return Dataset(*turned(dataset.x, dataset.y), *turned(dataset.x_test, dataset.y_test))


def mnist49():
    """The fours and nines of MNIST, its two classes that are most alike: 2 classes."""
    dataset = mnist()

    def chosen(x, y):
        kept = np.isin(y, (4, 9))
        return x[kept], (y[kept] == 9).astype("int64")

    return Dataset(*chosen(dataset.x, dataset.y), *chosen(dataset.x_test, dataset.y_test))


def hold_out(dataset, per_class):
    """Turns some images of each class, always the same, into the test set."""
    order = np.random.default_rng(0).permutation(len(dataset.y))
    test = np.concatenate([order[dataset.y[order] == label][:per_class] for label in range(dataset.classes)])
    rest = np.setdiff1d(order, test)
    return Dataset(dataset.x[rest], dataset.y[rest], dataset.x[test], dataset.y[test])


def cifar10():
    """50,000 + 10,000 photographs of 32 x 32 pixels in 10 classes: see `_cifar`."""
    return _cifar(keras.datasets.cifar10, [f"data_batch_{part}.bin" for part in range(1, 6)], "test_batch.bin", labels=1)


def cifar100():
    """50,000 + 10,000 photographs of 32 x 32 pixels in 100 classes: see `_cifar`."""
    return _cifar(keras.datasets.cifar100, ["train.bin"], "test.bin", labels=2)


def _cifar(source, train_names, test_name, labels):
    """From the files of the "binary version" if they are there, else by `keras.datasets`.

    Every record of the binary version is `labels` bytes, the last of them the class, and 3 x 32 x 32 bytes of pixels. (The
    "python version" is pickles, which could run anything.)
    """
    paths = [find(name) for name in (*train_names, test_name)]
    if None in paths:
        try:
            (x, y), (x_test, y_test) = source.load_data()
        except Exception as error:
            names = ", ".join((*train_names, test_name))
            absent = missing((*train_names, test_name)[paths.index(None)])
            raise UserError(
                f"CIFAR could not be downloaded ({_first_line(error)}), and {absent}; the binary version is {names}."
            ) from error
        return Dataset(
            *(part for x, y in [(x, y), (x_test, y_test)] for part in (_photographs(x), y.reshape(-1).astype("int64")))
        )
    size = labels + 3 * 32 * 32
    parts = []
    for path in paths:
        content = np.frombuffer(path.read_bytes(), "uint8")
        if len(content) == 0 or len(content) % size:
            raise UserError(
                f"{path} is not a file of CIFAR's binary version: expected records of {size} bytes, {len(content)} found."
            )
        parts.append(content.reshape(-1, size))
    train, test = np.concatenate(parts[:-1]), parts[-1]
    arrays = []
    for records in (train, test):
        arrays.append(_photographs(records[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)))
        arrays.append(records[:, labels - 1].astype("int64"))
    return Dataset(*arrays)


def _photographs(x):
    return (x / np.float32(255)).astype("float32")


def image_folder(path, size=(227, 227)):
    """Images in one folder for each class; the classes are numbered in the order of the folders' names.

    Args:
        path: Path of the folder that has the classes' folders.
        size: Height and width to which every image is scaled. Defaults to `(227, 227)`.

    Returns:
        A `Dataset` without a test set; its `x` is uint8, from 0 to 255, as there may be many.

    Raises:
        UserError: if there are fewer than two classes' folders, one has no images, or a file cannot be read as an image.
    """
    folders = sorted(folder for folder in Path(path).glob("*") if folder.is_dir())
    if len(folders) < 2:
        raise UserError(f"{path} must have a folder for each class, two at least; it has {len(folders)}.")
    images, labels = [], []
    for label, folder in enumerate(folders):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in {".jpg", ".jpeg", ".png", ".bmp"})
        if not files:
            raise UserError(f"{folder} has no images (.jpg, .jpeg, .png, .bmp).")
        for file in files:
            try:
                images.append(np.asarray(keras.utils.load_img(file, target_size=size), "uint8"))
            except Exception as error:  # a broken image raises whatever its decoder does
                raise UserError(f"{file} cannot be read as an image ({_first_line(error)}).") from error
            labels.append(label)
    return Dataset(np.stack(images), np.array(labels, "int64"))


def awa2():
    """Animals with Attributes 2: 37,322 photographs of 50 animals, in a local folder `JPEGImages`.

    To test there are as many of each class as are a fifth of the smallest class.
    """
    folder = find("JPEGImages")
    if folder is None:
        raise UserError(f"Animals with Attributes 2 cannot be read: {missing('JPEGImages')}; it is a folder of the data set.")
    dataset = image_folder(folder)
    return hold_out(dataset, int(np.bincount(dataset.y).min()) // 5)


LOADERS = {
    "digits": digits,
    "mnist": mnist,
    "mnist49": mnist49,
    "omniglot242": omniglot242,
    "omniglot968": omniglot968,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "awa2": awa2,
}


def find(name):
    """The file of this name in or below the folder that `TF_DROPMAX_DATA` names, or `None`."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise UserError(f"{FOLDER_VARIABLE} names {folder}, which is not a folder.")
    return min(Path(folder).rglob(name), key=lambda path: (len(path.parts), path), default=None)


def missing(name):
    """Half a sentence that says why `find(name)` found nothing."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        return f"there is no {name} in or below {folder}, the folder that {FOLDER_VARIABLE} names"
    return f"{FOLDER_VARIABLE} is not set (it should name a folder with {name} in or below it)"


def _arrays(path, *keys):
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            return [file[key] for key in keys]
    except KeyError as error:
        raise UserError(f"{path} lacks an array: expected {', '.join(keys)}; {_first_line(error)}.") from error
    except Exception as error:  # a broken archive raises whatever the parser that met the break raises
        raise UserError(f"{path} cannot be read as a NumPy archive ({_first_line(error)}).") from error


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def split(dataset, train_per_class, validation=0, seed=0):
    """Draws a training and a validation set; what is left over, or the data set's own test set, is the test set.

    Args:
        dataset: A `Dataset`.
        train_per_class: Positive int, training examples of each class; or `None`, all but the validation set.
        validation: Non-negative int, number of validation examples, of any class. Defaults to 0.
        seed: Int. The same seed gives the same split. Defaults to 0.

    Returns:
        A `Split`; its parts do not overlap.

    Raises:
        UserError: if there are too few examples.
    """
    counts = np.bincount(dataset.y, minlength=dataset.classes)
    order = np.random.default_rng(seed).permutation(len(dataset.y))
    if train_per_class is None:
        chosen, train = order[:validation], order[validation:]
        return Split(*((dataset.x[part], dataset.y[part]) for part in (train, chosen)), (dataset.x_test, dataset.y_test))
    if counts.min() < train_per_class or counts.sum() < train_per_class * dataset.classes + validation:
        raise UserError(
            f"Expected at least {train_per_class} examples of each class and {validation} more; "
            f"the smallest class has {counts.min()}, all together {counts.sum()}."
        )
    train = np.concatenate([order[dataset.y[order] == label][:train_per_class] for label in range(dataset.classes)])
    others = order[~np.isin(order, train)]
    chosen, rest = others[:validation], others[validation:]
    test = (dataset.x[rest], dataset.y[rest]) if dataset.x_test is None else (dataset.x_test, dataset.y_test)
    return Split((dataset.x[train], dataset.y[train]), (dataset.x[chosen], dataset.y[chosen]), test)
