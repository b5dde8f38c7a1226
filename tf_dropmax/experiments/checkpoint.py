"""The callback that makes a training run resumable and records its course."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import keras

from tf_dropmax.experiments.runner import Job, key


class Checkpoint(keras.callbacks.Callback):
    """Saves weights, optimizer and records between epochs, at most every 20 seconds.

    A kill at any moment leaves the last complete save.

    Args:
        folder: Path of the folder for the saves. `None` saves nothing.
        job: The job, whose hash names the files.
        measure_after: The numbers of the epochs, from 1, after which `measure` is called.
        measure: Function without arguments that returns a dictionary of JSON values.

    Attributes:
        losses: List of the training loss of every epoch.
        curve: List of the results of `measure`, each with the number of the step, `"step"`.
    """

    def __init__(
        self,
        folder: Path | str | None,
        job: Job,
        measure_after: Collection[int],
        measure: Callable[[], dict[str, Any]],
    ):
        super().__init__()
        self.folder = None if folder is None else Path(folder)
        self.name = hashlib.sha256(key(job).encode()).hexdigest()[:16]
        self.losses: list[float] = []
        self.curve: list[dict[str, Any]] = []
        self.measure_after, self.measure = measure_after, measure
        self.earlier = 0.0  # Seconds of training before the last resumption.
        self.started = self.saved = time.monotonic()

    def seconds(self) -> float:
        """Seconds of training, without interruptions."""
        return self.earlier + time.monotonic() - self.started

    def restore(self, model: keras.Model) -> int:
        """Loads the last save, if there is one, and starts the clock.

        Returns:
            The number of epochs that the save contains, 0 without a save.
        """
        saves = {_epoch(path): path for path in self._files("weights.h5")}
        epoch = max(saves, default=0)
        if epoch:
            model.optimizer.build(model.trainable_variables)
            model.load_weights(saves[epoch])
            state = json.loads(saves[epoch].with_name(f"{self.name}-{epoch}.json").read_text())
            self.losses, self.curve = state["loss"], state["curve"]
            self.earlier = state["seconds"]
        self.started = time.monotonic()
        return epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.losses.append(float(logs["loss"]))
        if epoch + 1 in self.measure_after:
            self.curve.append({"step": int(self.model.optimizer.iterations), **self.measure()})
        if self.folder and time.monotonic() - self.saved > 20:
            self._save(self.folder)
            self.saved = time.monotonic()

    def _save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        old = self._files("*")
        stem = f"{self.name}-{len(self.losses)}"
        state = {"loss": self.losses, "curve": self.curve, "seconds": self.seconds()}
        (folder / f"{stem}.json").write_text(json.dumps(state))
        # `restore` looks for the weights. Their rename completes the save.
        temporary = folder / f"{self.name}.weights.h5"
        self.model.save_weights(temporary, overwrite=True)
        temporary.replace(folder / f"{stem}.weights.h5")
        for path in old:
            path.unlink()

    def remove(self) -> None:
        """Deletes the files of this job."""
        for path in self._files("*"):
            path.unlink()

    def _files(self, kind: str) -> list[Path]:
        return list(self.folder.glob(f"{self.name}-*.{kind}")) if self.folder else []


def _epoch(path: Path) -> int:
    """The number of the epoch in the name of a file, `NAME-EPOCH.weights.h5`."""
    return int(path.name.split("-")[1].split(".")[0])
