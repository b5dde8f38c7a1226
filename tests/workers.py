"""Programs that tests start in new processes: `python workers.py PROGRAM FOLDER`."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from models import MODES

import tf_dropmax

FOLDER = Path(sys.argv[-1])


def data():
    draw = np.random.default_rng(0)
    centres = 3 * draw.normal(size=(3, 5))
    y = draw.integers(3, size=64)
    return (centres[y] + draw.normal(size=(64, 5))).astype("float32"), y


def model(**kwargs):
    model = keras.Sequential([keras.Input((5,)), tf_dropmax.DropMaxHead(3, seed=1, **kwargs)])
    model.compile(keras.optimizers.Adam(0.05), tf_dropmax.DropMaxLoss(), metrics=["accuracy"])
    return model


def killed():
    """Trains 240 slow steps, with a backup after every epoch."""
    head = model()
    callbacks = [
        keras.callbacks.LambdaCallback(
            on_train_begin=lambda logs: (FOLDER / "begun").touch(),
            on_train_batch_end=lambda batch, logs: time.sleep(0.01),
        ),
        keras.callbacks.ModelCheckpoint(FOLDER / "last.keras"),
        keras.callbacks.BackupAndRestore(FOLDER / "backup", double_checkpoint=True),
    ]
    head.fit(*data(), batch_size=16, epochs=60, shuffle=False, verbose=0, callbacks=callbacks)
    result = {
        "steps": int(head.optimizer.iterations.numpy()),
        "weights": [weight.tolist() for weight in head.get_weights()],
    }
    (FOLDER / "result.json").write_text(json.dumps(result))


def predictions(posterior):
    """What a trained head predicts in every mode."""
    x, y = data()
    head = model(posterior=posterior)
    metrics = [
        "accuracy",
        tf_dropmax.NegativeLogLikelihood(),
        tf_dropmax.BrierScore(),
        tf_dropmax.ExpectedCalibrationError(),
    ]
    head.compile(keras.optimizers.Adam(0.2), tf_dropmax.DropMaxLoss(), metrics=metrics)
    head.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0)
    result = []
    for mode in MODES if posterior == "prior" else ["expected"]:
        head.layers[-1].predict_mode = mode
        result.append(np.exp(head.predict(x, verbose=0)).tolist())
    return result


def baselines(_=None):
    """Trains with the losses of the other systems."""
    for loss in (tf_dropmax.SparsemaxLoss(), tf_dropmax.SampledSoftmaxLoss(0.5, seed=1)):
        dense = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
        dense.compile("sgd", loss)
        assert np.isfinite(dense.fit(*data(), verbose=0).history["loss"][0])


def write_predictions(map_, runs=1):
    """Calls both functions by a function like `map`."""
    result = {name: list(map_(predictions, runs * [name])) for name in ("prior", "label")}
    list(map_(baselines, runs * [None]))
    (FOLDER / "result.json").write_text(json.dumps(result))


def threads():
    """Two threads train and use a head of their own at the same time, nothing traced before."""
    with ThreadPoolExecutor(2) as pool:
        write_predictions(pool.map, runs=2)


def switches():
    """Two switches that change every operation. Neither can be undone."""
    tf.debugging.enable_check_numerics()
    tf.experimental.numpy.experimental_enable_numpy_behavior()
    write_predictions(map)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
