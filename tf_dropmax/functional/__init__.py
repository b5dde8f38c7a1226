"""The mathematics of DropMax as pure functions: tensors in, tensors out.

Equation numbers refer to *DropMax: Adaptive Stochastic Softmax* (ICLR 2018 submission, version 1
of arXiv:1712.07834). `logits` are `o = W h + b`, `retain_logits` are `r = V h + c`, and the
retain probability of a class is `rho = sigmoid(r)` (4). `T`, the number of classes, is the size
of the last axis.

All functions take any leading shape. They compute in float64 if the logits are float64 and in
float32 otherwise. Results and gradients are finite for inputs of magnitudes up to 1e30. A NaN gives
NaN. The paper adds a small epsilon to the numerator and to the denominator of the softmax; these
functions do not. If a mask drops every class, the softmax is uniform.

The functions do not check their arguments. Shapes that do not fit raise TensorFlow's errors, and
`samples` below 1 gives NaN. `DropMaxHead` checks what it is given.
"""

from tf_dropmax.functional.masks import (
    bernoulli_mask_logits,
    relaxed_mask_logits,
    uniform_draws,
)
from tf_dropmax.functional.objective import (
    label_scores_and_entropy,
    mask_entropy,
    posterior_logits,
    prior_scores_and_entropy,
    target_log_likelihood,
)
from tf_dropmax.functional.prediction import (
    expected_log_probabilities,
    sampled_log_probabilities,
    softmax_log_probabilities,
)
from tf_dropmax.functional.quadrature import exact_log_probabilities
from tf_dropmax.functional.uncertainties import Uncertainty, uncertainty

__all__ = [
    "Uncertainty",
    "bernoulli_mask_logits",
    "exact_log_probabilities",
    "expected_log_probabilities",
    "label_scores_and_entropy",
    "mask_entropy",
    "posterior_logits",
    "prior_scores_and_entropy",
    "relaxed_mask_logits",
    "sampled_log_probabilities",
    "softmax_log_probabilities",
    "target_log_likelihood",
    "uncertainty",
    "uniform_draws",
]
