"""The metrics of Keras that accept log-probabilities instead of probabilities."""

import numpy as np
import pytest
import tensorflow as tf
from keras import metrics

T = 5
CAP = np.float32(np.log1p(-(2.0**-24)))

# Each case: a function that makes the metric for log-probabilities, and one that makes it for
# probabilities if that needs other arguments.
ACCEPT = {
    "CategoricalAccuracy": (metrics.CategoricalAccuracy,),
    "CategoricalCrossentropy(from_logits=True)": (
        lambda: metrics.CategoricalCrossentropy(from_logits=True),
        metrics.CategoricalCrossentropy,
    ),
    "F1Score": (metrics.F1Score,),
    "F1Score(average='micro')": (lambda: metrics.F1Score("micro"),),
    "F1Score(average='macro')": (lambda: metrics.F1Score("macro"),),
    "F1Score(average='weighted')": (lambda: metrics.F1Score("weighted"),),
    "FBetaScore": (lambda: metrics.FBetaScore("macro", beta=2.0),),
    "IoU(sparse_y_pred=False)": (lambda: metrics.IoU(T, [0, 2], sparse_y_pred=False),),
    "MeanIoU(sparse_y_pred=False)": (lambda: metrics.MeanIoU(T, sparse_y_pred=False),),
    "OneHotIoU": (lambda: metrics.OneHotIoU(T, [0, 2]),),
    "OneHotMeanIoU": (lambda: metrics.OneHotMeanIoU(T),),
    "Precision(top_k=2)": (lambda: metrics.Precision(top_k=2),),
    "Precision(top_k=1, class_id=0)": (lambda: metrics.Precision(top_k=1, class_id=0),),
    "Recall(top_k=2)": (lambda: metrics.Recall(top_k=2),),
    "Recall(top_k=1, class_id=0)": (lambda: metrics.Recall(top_k=1, class_id=0),),
    "SparseCategoricalAccuracy": (metrics.SparseCategoricalAccuracy,),
    "SparseCategoricalCrossentropy(from_logits=True)": (
        lambda: metrics.SparseCategoricalCrossentropy(from_logits=True),
        metrics.SparseCategoricalCrossentropy,
    ),
    "SparseTopKCategoricalAccuracy": (lambda: metrics.SparseTopKCategoricalAccuracy(k=2),),
    "TopKCategoricalAccuracy": (lambda: metrics.TopKCategoricalAccuracy(k=2),),
}
TAKE_SPARSE_LABELS = (
    "IoU(sparse_y_pred=False)",
    "MeanIoU(sparse_y_pred=False)",
    "SparseCategoricalAccuracy",
    "SparseCategoricalCrossentropy(from_logits=True)",
    "SparseTopKCategoricalAccuracy",
)


@pytest.fixture(scope="module")
def predictions():
    """Labels, log-probabilities and probabilities. In the first four rows one class is sure."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % T
    logits = rng.normal(size=(40, T)) + 1.5 * np.eye(T)[labels]
    logits[np.arange(4), labels[:4]] += 60
    log_p = tf.nn.log_softmax(logits.astype("float32")).numpy()
    assert (log_p == 0).sum() == 4
    return labels, log_p, tf.nn.softmax(logits).numpy().astype("float32")


def value_of(metric, name, labels, y_pred):
    y_true = labels if name in TAKE_SPARSE_LABELS else np.eye(T, dtype="float32")[labels]
    return np.asarray(metric(y_true, y_pred))


@pytest.mark.parametrize("name", ACCEPT)
def test_metrics_that_accept_log_probabilities(name, predictions):
    labels, log_p, p = predictions
    make, make_for_probabilities = ACCEPT[name][0], ACCEPT[name][-1]
    expected = value_of(make_for_probabilities(), name, labels, p)
    assert ((expected > 0.1) & (expected < 0.99)).all()
    value = value_of(make(), name, labels, np.minimum(log_p, CAP))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["F1Score", "FBetaScore"])
def test_f_scores_need_the_cap(name, predictions):
    """They ignore entries that are 0. The log-probability of a sure class is 0 without the cap."""
    labels, log_p, p = predictions
    expected, uncapped = (value_of(ACCEPT[name][0](), name, labels, x) for x in (p, log_p))
    assert np.abs(uncapped - expected).max() > 0.01
