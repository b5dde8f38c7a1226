"""`MirroredStrategy` over two logical CPUs; see conftest.py."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import DETERMINISTIC, mean_nll

from tf_dropmax import (
    DropMaxHead,
    DropMaxLoss,
    DropMaxMonitor,
    DropMaxPredict,
    calibrate,
    set_predict_mode,
)


def build(**kwargs):
    model = keras.Sequential([keras.Input((6,)), DropMaxHead(4, seed=1, **kwargs)])
    model.compile(keras.optimizers.SGD(0.3), DropMaxLoss(), metrics=["accuracy"])
    return model


@pytest.mark.parametrize("training", [True, False])
def test_replicas_draw_different_masks(strategy, training):
    with strategy.scope():
        head = DropMaxHead(200, seed=1)
        head.build((None, 3))
    set_predict_mode(head, "sampled", 1)

    @tf.function
    def outputs():
        return strategy.run(lambda: head(tf.zeros((50, 3)), training=training))

    # In a row, the output of a class depends on nothing but its mask.
    draws = [x for _ in range(2) for x in strategy.experimental_local_results(outputs())]
    rows = [(x - tf.reduce_mean(x, -1, keepdims=True)).numpy().ravel() for x in draws]
    assert abs(np.corrcoef(rows) - np.eye(4)).max() < 0.05  # 5 sigma


def test_the_gradient_is_that_of_one_device_on_the_joined_batch(strategy, blobs):
    """Without masks, which differ between replicas. The entropy term is scaled like the loss."""
    x, y = blobs
    with strategy.scope():
        model = build(stochastic=False, entropy_weight=2.0)
    single = build(stochastic=False, entropy_weight=2.0)
    fit = {"batch_size": 40, "epochs": 3, "shuffle": False, "verbose": 0}
    histories = [m.fit(x, y, **fit).history for m in (model, single)]
    np.testing.assert_allclose(histories[0]["loss"], histories[1]["loss"], rtol=1e-5)
    for one, other in zip(model.get_weights(), single.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_monitor_and_calibrate_use_the_examples_of_all_replicas(strategy, blobs):
    """The last batch is not full, so the replicas have different numbers of examples."""
    x, y = blobs
    with strategy.scope():
        model = build(retain={"kernel_initializer": keras.initializers.RandomNormal(seed=3)})
        model.unused = keras.layers.Dense(1)  # It is never built.
    single = build()
    single.set_weights(model.get_weights())
    found = []
    for each in (model, single):
        each.optimizer.learning_rate = 0.0
        monitors = [DropMaxMonitor(x[:67], y[:67], batch_size=16)]
        history = each.fit(x, y, epochs=2, callbacks=monitors, verbose=0).history
        names = [name for name in history if name not in ("loss", "accuracy")]
        temperature = calibrate(each, x[:67], y[:67] // 2, batch_size=16)
        found.append([temperature, *(value for name in names for value in history[name])])
    assert len(found[0]) == 9
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_a_replica_without_examples(strategy, blobs):
    """The last of 33 rows is a batch of its own, of which one replica gets nothing."""
    x, y = blobs
    with strategy.scope():
        model = build(stochastic=False)
    loss = model.fit(x[:33], y[:33], batch_size=32, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(loss).all()
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.parametrize("settings", [{"posterior": "label"}, {"retain_probability": 0.6}], ids=str)
def test_other_heads_train(strategy, blobs, settings):
    x, y = blobs
    with strategy.scope():
        model = build(**settings)
    model.fit(x, y, batch_size=40, epochs=9, verbose=0)
    assert np.mean(model(x).numpy().argmax(-1) != y) < 0.1


def test_fit_evaluate_predict_in_all_modes(strategy, blobs):
    x, y = blobs
    start = keras.initializers.RandomNormal(stddev=1.5, seed=3)
    with strategy.scope():
        model = build(retain={"kernel_initializer": start})
    settings = {"batch_size": 80, "epochs": 2, "verbose": 0}
    model.fit(x, y, validation_data=(x, y), callbacks=[DropMaxPredict("sampled")], **settings)
    single = build()
    single.set_weights(model.get_weights())
    expected = {}
    for mode in DETERMINISTIC:
        set_predict_mode(single, mode)
        expected[mode] = single(x).numpy()
        found = model.predict(x, batch_size=80, callbacks=[DropMaxPredict(mode)], verbose=0)
        np.testing.assert_allclose(found, expected[mode], atol=1e-5)
    assert np.abs(expected["exact"] - expected["expected"]).max() > 1e-2
    loss, _ = model.evaluate(x, y, 80, callbacks=[DropMaxPredict("exact")], verbose=0)
    assert loss == pytest.approx(mean_nll(expected["exact"], y), rel=1e-4)
    drawing = DropMaxPredict("sampled", samples=200)
    sampled = model.predict(x, batch_size=80, callbacks=[drawing], verbose=0)
    np.testing.assert_allclose(np.exp(sampled), np.exp(expected["exact"]), atol=0.25)
