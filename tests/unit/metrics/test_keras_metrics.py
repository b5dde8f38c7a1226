"""Which metrics of Keras accept log-probabilities instead of probabilities, and which do not."""

import keras
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
DO_NOT_ACCEPT = {
    "AUC": (metrics.AUC,),
    # It applies a sigmoid, which keeps the order. So the value is close, but not equal: the
    # thresholds are between other predictions.
    "AUC(from_logits=True)": (lambda: metrics.AUC(from_logits=True), metrics.AUC),
    "AUC(multi_label=True)": (lambda: metrics.AUC(multi_label=True, num_labels=T),),
    "Accuracy": (metrics.Accuracy,),
    "BinaryAccuracy": (metrics.BinaryAccuracy,),
    "BinaryCrossentropy": (metrics.BinaryCrossentropy,),
    "BinaryCrossentropy(from_logits=True)": (
        lambda: metrics.BinaryCrossentropy(from_logits=True),
        metrics.BinaryCrossentropy,
    ),
    "BinaryIoU": (metrics.BinaryIoU,),
    "CategoricalCrossentropy": (metrics.CategoricalCrossentropy,),
    "CategoricalHinge": (metrics.CategoricalHinge,),
    "F1Score(threshold=0.5)": (lambda: metrics.F1Score("macro", threshold=0.5),),
    "FBetaScore(threshold=0.5)": (lambda: metrics.FBetaScore("macro", threshold=0.5),),
    "FalseNegatives": (metrics.FalseNegatives,),
    "FalsePositives": (metrics.FalsePositives,),
    "Hinge": (metrics.Hinge,),
    "IoU": (lambda: metrics.IoU(T, [0, 2]),),
    "KLDivergence": (metrics.KLDivergence,),
    "MeanIoU": (lambda: metrics.MeanIoU(T),),
    "Poisson": (metrics.Poisson,),
    "Precision": (metrics.Precision,),
    "Precision(top_k=1, thresholds=0.5)": (lambda: metrics.Precision(0.5, top_k=1),),
    "PrecisionAtRecall": (lambda: metrics.PrecisionAtRecall(0.6),),
    "Recall": (metrics.Recall,),
    "RecallAtPrecision": (lambda: metrics.RecallAtPrecision(0.6),),
    "SensitivityAtSpecificity": (lambda: metrics.SensitivityAtSpecificity(0.6),),
    "SparseCategoricalCrossentropy": (metrics.SparseCategoricalCrossentropy,),
    "SpecificityAtSensitivity": (lambda: metrics.SpecificityAtSensitivity(0.6),),
    "SquaredHinge": (metrics.SquaredHinge,),
    "TrueNegatives": (metrics.TrueNegatives,),
    "TruePositives": (metrics.TruePositives,),
}
NOT_FOR_CLASSIFICATION = {
    "ConcordanceCorrelation",
    "CosineSimilarity",
    "LogCoshError",
    "Mean",
    "MeanAbsoluteError",
    "MeanAbsolutePercentageError",
    "MeanMetricWrapper",
    "MeanSquaredError",
    "MeanSquaredLogarithmicError",
    "Metric",
    "PearsonCorrelation",
    "R2Score",
    "RootMeanSquaredError",
    "Sum",
}
# These take class indices as predictions, not probabilities.
TAKE_INDICES = ("Accuracy", "IoU", "MeanIoU")
TAKE_SPARSE_LABELS = (
    *TAKE_INDICES,
    "IoU(sparse_y_pred=False)",
    "MeanIoU(sparse_y_pred=False)",
    "SparseCategoricalAccuracy",
    "SparseCategoricalCrossentropy",
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


@pytest.mark.parametrize("name", DO_NOT_ACCEPT)
def test_metrics_that_do_not_accept_log_probabilities(name, predictions):
    labels, log_p, p = predictions
    make, make_for_probabilities = DO_NOT_ACCEPT[name][0], DO_NOT_ACCEPT[name][-1]
    right_predictions = p.argmax(-1) if name in TAKE_INDICES else p
    expected = value_of(make_for_probabilities(), name, labels, right_predictions)
    assert np.isfinite(expected).all()
    try:
        value = value_of(make(), name, labels, np.minimum(log_p, CAP))
    except (ValueError, tf.errors.InvalidArgumentError):
        return
    assert not np.allclose(value, expected, rtol=1e-5, atol=0)


def test_the_lists_are_complete():
    exported = {
        name
        for name, value in vars(keras.metrics).items()
        if isinstance(value, type) and issubclass(value, keras.metrics.Metric)
    }
    listed = {name.partition("(")[0] for name in (*ACCEPT, *DO_NOT_ACCEPT)}
    assert listed | NOT_FOR_CLASSIFICATION == exported
    assert not listed & NOT_FOR_CLASSIFICATION
