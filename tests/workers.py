"""Programs that tests start in new processes: `python workers.py PROGRAM FOLDER`."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import tensorflow as tf

import tf_dropmax
from tf_dropmax import tuning

FOLDER = Path(sys.argv[2])


def data():
    draw = np.random.default_rng(0)
    centres = 3 * draw.normal(size=(3, 5))
    y = draw.integers(3, size=64)
    return (centres[y] + draw.normal(size=(64, 5))).astype("float32"), y


def model(**kwargs):
    model = keras.Sequential([keras.Input((5,)), tf_dropmax.DropMaxHead(3, seed=1, **kwargs)])
    model.compile(keras.optimizers.Adam(0.05), tf_dropmax.DropMaxLoss(), metrics=["accuracy"])
    return model


def multi_worker():
    """Trains the head with and without masks. In a folder `lost` it trains only without masks.

    It kills itself during an epoch if there is a file `kill-INDEX`.
    """
    index, strategy = 0, tf.distribute.get_strategy()
    if "TF_CONFIG" in os.environ:
        index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    batches = tf.data.Dataset.from_tensor_slices(data()).batch(16)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = batches.with_options(options)
    result = {}
    for name, stochastic in (("deterministic", False), ("stochastic", True)):
        if stochastic and FOLDER.name == "lost":
            continue
        with strategy.scope():
            head = model(stochastic=stochastic)

        def end(batch, logs, index=index, head=head):
            kill = FOLDER / f"kill-{index}"
            # Step 10 is in the third epoch of 4 steps.
            if kill.exists() and int(head.optimizer.iterations.numpy()) == 10:
                kill.unlink()
                os.kill(os.getpid(), signal.SIGKILL)

        callbacks = [
            keras.callbacks.LambdaCallback(on_train_batch_end=end),
            keras.callbacks.BackupAndRestore(FOLDER / f"{name}-{index}", double_checkpoint=True),
        ]
        with tf_dropmax.multi_worker(head):
            history = head.fit(
                batches, epochs=6, validation_data=batches, verbose=0, callbacks=callbacks
            ).history
            p = np.exp(head.predict(batches, verbose=0))
        result[name] = {
            "history": history,
            "weights": [weight.tolist() for weight in head.get_weights()],
            "steps": int(head.optimizer.iterations.numpy()),
            "rows": len(p),
        }
    (FOLDER / f"result-{index}.json").write_text(json.dumps(result))


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


if __name__ == "__main__":
    globals()[sys.argv[1]]()
