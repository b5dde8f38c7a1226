"""Independent answers in float64. They share no code with the library.

Most are loops and enumeration in numpy. Those that begin with `tf_` are plain formulas for one row,
which TensorFlow differentiates.
"""

import itertools

import numpy as np
import tensorflow as tf


def sigmoid(x):
    x = np.asarray(x, np.float64)
    return np.where(
        x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x)))
    )


def objective(logits, retain_logits, uniform, labels, entropy_weight, temperature):
    """Eq. (15) with its sign turned, term by term as printed, mean over the rows."""
    total = 0.0
    for o, r, u, y in zip(logits, retain_logits, uniform, labels, strict=True):
        rho = sigmoid(r)
        z = sigmoid((r + np.log(u) - np.log(1 - u)) / temperature)
        z[y] = 1.0
        w = np.exp(o - o.max())
        cross_entropy = -np.log(z[y] * w[y] / np.sum(z * w))
        kl = -np.log(rho[y])
        h = -rho * np.log(rho) - (1 - rho) * np.log(1 - rho)
        total += cross_entropy + kl - entropy_weight * (h.sum() - h[y])
    return total / len(labels)


def label_objective(
    logits,
    retain_logits,
    auxiliary_logits,
    uniform,
    labels,
    entropy_weight,
    auxiliary_weight,
    temperature,
):
    """The objective with the label posterior (NeurIPS 2018), term by term, mean over the rows.

    Nothing is held fixed.
    """
    total = 0.0
    for o, r, a, u, y in zip(logits, retain_logits, auxiliary_logits, uniform, labels, strict=True):
        rho, s = sigmoid(r), sigmoid(a)
        q = sigmoid(r + a)
        # Without draws, every mask is replaced by its mean.
        z = q.copy() if u is None else sigmoid((r + a + np.log(u) - np.log(1 - u)) / temperature)
        z[y] = 1.0
        w = np.exp(o - o.max())
        others = np.arange(len(o)) != y
        kl = -np.log(rho[y])
        kl += np.sum((q * np.log(q / rho) + (1 - q) * np.log((1 - q) / (1 - rho)))[others])
        auxiliary = -np.log(s[y]) - np.sum(np.log(1 - s[others]))
        h = -rho * np.log(rho) - (1 - rho) * np.log(1 - rho)
        total += (
            -np.log(w[y] / np.sum(z * w))
            + kl
            + auxiliary_weight * auxiliary
            - entropy_weight * h.sum()
        )
    return total / len(labels)


def project_onto_simplex(z):
    """Sparsemax of one row: of all supports, the one whose projection is closest."""
    best, distance = None, np.inf
    for size in range(1, len(z) + 1):
        for support in itertools.combinations(range(len(z)), size):
            support = list(support)
            p = np.zeros(len(z))
            p[support] = z[support] - (z[support].sum() - 1) / size
            if p.min() >= 0 and np.sum((p - z) ** 2) < distance:
                best, distance = p, np.sum((p - z) ** 2)
    return best


def enumerate_masks(logits, retain_logits):
    """Eq. (16): the softmax (5) under every one of the 2^T masks, weighted by its probability."""
    classes = np.shape(logits)[-1]
    masks = np.array(list(itertools.product([False, True], repeat=classes)))
    rows = []
    for o, r in zip(
        np.asarray(logits, np.float64), np.asarray(retain_logits, np.float64), strict=True
    ):
        log_weight = np.where(masks, -np.logaddexp(0, -r), -np.logaddexp(0, r)).sum(1)
        top = np.where(masks, o, -np.inf).max(1, keepdims=True)
        w = np.where(masks, np.exp(np.minimum(o - np.where(np.isfinite(top), top, 0), 0)), 0.0)
        total = w.sum(1, keepdims=True)
        p = np.where(total > 0, w / np.where(total > 0, total, 1), 1 / classes)
        rows.append(np.exp(log_weight) @ p)
    return np.array(rows)


def central_differences(function, x, step):
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        high, low = x.copy(), x.copy()
        high[index] += step
        low[index] -= step
        gradient[index] = (function(high) - function(low)) / (2 * step)
    return gradient


def tf_mask_entropy(retain_logits):
    rho = tf.sigmoid(retain_logits)
    return -rho * tf.math.log(rho) - (1 - rho) * tf.math.log(1 - rho)


def tf_target_log_likelihood(logits, mask_logits):
    """`o_k - log D_k`, where `D_k` is a sum over all classes, with the mask of class k at 1."""
    weights = tf.exp(logits)
    kept = weights * tf.sigmoid(mask_logits)
    return logits - tf.math.log(tf.reduce_sum(kept) - kept + weights)


def tf_prior_scores_and_entropy(logits, retain_logits, mask_logits, entropy_weight, kl_weight):
    entropies = tf_mask_entropy(retain_logits)
    likelihood = tf_target_log_likelihood(logits, mask_logits)
    scores = likelihood + kl_weight * tf.math.log_sigmoid(retain_logits)
    scores -= entropy_weight * entropies
    return scores, tf.reduce_sum(entropies)


def tf_label_scores_and_entropy(logits, prior, auxiliary, masks, auxiliary_weight, kl_weight):
    """The posterior gives no gradient to the retain logits of the prior."""
    rho, q = tf.sigmoid(prior), tf.sigmoid(tf.stop_gradient(prior) + auxiliary)
    divergences = q * tf.math.log(q / rho) + (1 - q) * tf.math.log((1 - q) / (1 - rho))
    s = tf.sigmoid(auxiliary)
    others = kl_weight * divergences - auxiliary_weight * tf.math.log(1 - s)
    target = -kl_weight * tf.math.log(rho) - auxiliary_weight * tf.math.log(s)
    likelihood = tf_target_log_likelihood(logits, masks)
    scores = likelihood - (tf.reduce_sum(others) - others + target)
    return scores, tf.reduce_sum(tf_mask_entropy(prior))
