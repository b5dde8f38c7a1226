"""tf.distribute.MirroredStrategy over two logical CPUs (see conftest.py)."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dropmax import DropMaxHead, DropMaxLoss, DropMaxPredict, functional
from tf_dropmax.seeds import next_seed


@pytest.fixture
def strategy():
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def build(**kwargs):
    model = keras.Sequential([keras.Input((6,)), DropMaxHead(4, seed=1, **kwargs)])
    model.compile(keras.optimizers.SGD(0.3), DropMaxLoss(), metrics=["accuracy"])
    return model


def test_replicas_draw_masks_of_their_own(strategy):
    with strategy.scope():
        head = DropMaxHead(50, seed=1)
        head.build((None, 3))
    features = tf.ones((4, 3))

    @tf.function
    def outputs(training):
        return strategy.run(lambda: head(features, training=training))

    @tf.function
    def draws():
        return strategy.run(lambda: functional.uniform((10_000,), next_seed(head._train_seeds)))

    head.predict_mode = "sampled"
    for call in [lambda: outputs(True), lambda: outputs(False), draws]:
        one, other = (value.numpy() for value in strategy.experimental_local_results(call()))
        again, _ = (value.numpy() for value in strategy.experimental_local_results(call()))
        assert np.abs(one - other).max() > 1e-3
        assert np.abs(one - again).max() > 1e-3
    assert abs(np.corrcoef([one, other, again]) - np.eye(3)).max() < 0.05  # 5 sigma


def test_the_gradient_is_that_of_one_device_on_the_joined_batch(strategy, blobs):
    """Exactly so without masks; the entropy term is scaled like the loss."""
    x, y = blobs
    with strategy.scope():
        model = build(stochastic=False, entropy_weight=2.0)
    single = build(stochastic=False, entropy_weight=2.0)
    histories = [m.fit(x, y, batch_size=40, epochs=3, shuffle=False, verbose=0).history for m in (model, single)]
    np.testing.assert_allclose(histories[0]["loss"], histories[1]["loss"], rtol=1e-5)
    for one, other in zip(model.get_weights(), single.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_replica_without_examples(strategy, blobs):
    """33 rows in batches of 32: the last batch has one row, and one replica has none."""
    x, y = blobs
    with strategy.scope():
        model = build(stochastic=False)
    loss = model.fit(x[:33], y[:33], batch_size=32, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(loss).all()
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_fit_evaluate_predict_in_all_modes(strategy, blobs):
    x, y = blobs
    with strategy.scope():
        model = build()
    model.fit(x, y, batch_size=32, epochs=10, validation_data=(x, y), callbacks=[DropMaxPredict("sampled")], verbose=0)
    single = build()
    single.set_weights(model.get_weights())
    for mode in ["expected", "exact", "softmax"]:
        callbacks = [DropMaxPredict(mode)]
        one, other = (m.predict(x, callbacks=callbacks, verbose=0) for m in (model, single))
        np.testing.assert_allclose(one, other, atol=1e-5)
        one, other = (m.evaluate(x, y, callbacks=callbacks, verbose=0) for m in (model, single))
        np.testing.assert_allclose(one, other, rtol=1e-4)
    p = np.exp(model.predict(x, callbacks=[DropMaxPredict("sampled", samples=200)], verbose=0))
    np.testing.assert_allclose(p, np.exp(single.predict(x, callbacks=[DropMaxPredict("exact")], verbose=0)), atol=0.25)
    assert np.mean(p.argmax(-1) != y) < 0.1
