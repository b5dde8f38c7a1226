"""Programs that tests start in new processes: `python workers.py PROGRAM FOLDER`."""

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import tensorflow as tf
from models import MODES, VARIANTS

import tf_dropmax
from tf_dropmax import tuning

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


def tuner():
    """One process of a distributed search for `entropy_weight`. The environment says which."""
    (x, y), name = data(), os.environ["KERASTUNER_TUNER_ID"]

    def build(hp):
        return model(entropy_weight=hp.Float("entropy_weight", 0.01, 10.0, sampling="log"))

    search = keras_tuner.RandomSearch(
        build, "val_accuracy", max_trials=6, seed=1, directory=FOLDER, project_name="search"
    )
    search.search(x[:48], y[:48], validation_data=(x[48:], y[48:]), epochs=2, verbose=0)
    best = search.get_best_hyperparameters()[0].get("entropy_weight")
    (FOLDER / f"best-{name}.json").write_text(json.dumps(best))


def search():
    """A search for `entropy_weight` that can be resumed.

    It kills itself during its second trial if there is a file `kill`.
    """
    tf.config.run_functions_eagerly(True)  # Tracing takes longer.
    x, y = data()

    def features(hp):
        return keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, "relu")])

    hypermodel = tuning.DropMaxHyperModel(features, 3)
    tuner = keras_tuner.RandomSearch(
        hypermodel, hypermodel.objective, max_trials=3, directory=FOLDER, project_name="search"
    )

    def end(batch, logs):
        kill = FOLDER / "kill"
        if kill.exists() and len(tuner.oracle.trials) == 2:
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    callbacks = [keras.callbacks.LambdaCallback(on_train_batch_end=end)]
    tuner.search(x[:48], y[:48], validation_data=(x[48:], y[48:]), callbacks=callbacks, verbose=0)
    models = tuner.get_best_models(3)
    models[0].save(FOLDER / "best.keras")
    result = {
        "x": x[48:].tolist(),
        "y": y[48:].tolist(),
        "log_probabilities": [model(x[48:]).numpy().tolist() for model in models],
        "entropy_weight": tuner.get_best_hyperparameters()[0].get("entropy_weight"),
    }
    (FOLDER / "result.json").write_text(json.dumps(result))


def predictions(name):
    """What a trained head of a variant predicts in every mode. The modes do not depend on it."""
    x, y = data()
    head = model(**VARIANTS[name])
    metrics = [
        "accuracy",
        tf_dropmax.NegativeLogLikelihood(),
        tf_dropmax.BrierScore(),
        tf_dropmax.ExpectedCalibrationError(),
    ]
    head.compile(keras.optimizers.Adam(0.2), tf_dropmax.DropMaxLoss(), metrics=metrics)
    head.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0)
    result = []
    for mode in MODES if name == "prior" else ["expected"]:
        head.layers[-1].predict_mode = mode
        result.append(np.exp(head.predict(x, verbose=0)).tolist())
    return result


def baselines(_=None):
    """Trains with the losses of the other systems."""
    for loss in (tf_dropmax.SparsemaxLoss(), tf_dropmax.SampledSoftmaxLoss(0.5, seed=1)):
        dense = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
        dense.compile("sgd", loss)
        assert np.isfinite(dense.fit(*data(), verbose=0).history["loss"][0])


def _write_predictions(map_):
    """Runs both functions by a function like `map`."""
    result = {name: list(map_(predictions, [name])) for name in VARIANTS}
    list(map_(baselines, [None]))
    (FOLDER / "result.json").write_text(json.dumps(result))


def threads():
    """Four threads train and use a head of their own at the same time, nothing traced before."""
    with ThreadPoolExecutor(4) as pool:
        _write_predictions(lambda function, arguments: pool.map(function, 4 * arguments))


def check_numerics():
    tf.debugging.enable_check_numerics()
    _write_predictions(map)


def numpy_behavior():
    tf.experimental.numpy.experimental_enable_numpy_behavior()
    _write_predictions(map)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
