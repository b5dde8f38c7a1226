"""Local files of data sets, in or below the folder that `TF_DROPMAX_DATA` names."""

from __future__ import annotations

import os
from pathlib import Path

import keras
import numpy as np

from tf_dropmax.experiments.errors import UserError

FOLDER_VARIABLE = "TF_DROPMAX_DATA"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


def find(name: str) -> Path | None:
    """The path of a file or folder.

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


def missing(name: str) -> str:
    """A clause that says why `find(name)` returned `None`, for an error message."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        return f"there is no {name} in or below {folder}, the folder that {FOLDER_VARIABLE} names"
    return f"{FOLDER_VARIABLE} is not set (it should name a folder with {name} in or below it)"


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of a NumPy archive.

    Raises:
        UserError: If the file is not a NumPy archive or lacks one of the names.
    """
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            return [file[name] for name in names]
    except KeyError as error:
        expected = ", ".join(names)
        raise UserError(
            f"{path} lacks an array: expected {expected}; {first_line(error)}."
        ) from error
    except Exception as error:  # The exception depends on where the archive is broken.
        raise UserError(
            f"{path} cannot be read as a NumPy archive ({first_line(error)})."
        ) from error


def read_image_folders(
    path: Path | str, size: tuple[int, int] = (227, 227)
) -> tuple[np.ndarray, np.ndarray]:
    """Images that lie in one folder for each class.

    Args:
        path: Path of the folder that contains the folders of the classes.
        size: Height and width, to which every image is scaled. Defaults to `(227, 227)`.

    Returns:
        Images `(N, height, width, 3)`, uint8, and labels `(N,)`, int64. The classes are numbered
        in the order of the names of their folders.

    Raises:
        UserError: If there are fewer than two folders, a folder has no images, or a file cannot
            be read as an image.
    """
    folders = sorted(folder for folder in Path(path).glob("*") if folder.is_dir())
    if len(folders) < 2:
        raise UserError(
            f"{path} must contain two or more folders, one for each class. It has {len(folders)}."
        )
    images, labels = [], []
    for label, folder in enumerate(folders):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"{folder} has no images ({', '.join(IMAGE_SUFFIXES)}).")
        for file in files:
            try:
                images.append(np.asarray(keras.utils.load_img(file, target_size=size), "uint8"))
            except Exception as error:  # The exception depends on the decoder.
                raise UserError(
                    f"{file} cannot be read as an image ({first_line(error)})."
                ) from error
            labels.append(label)
    return np.stack(images), np.array(labels, "int64")


def first_line(error: Exception) -> str:
    """The first line of the message of an exception, or the name of its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]
