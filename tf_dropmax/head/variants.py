"""What each variant of the head is trained on.

The loss of an example is minus the score of its label, minus `entropy_weight` times the sum of the
mask entropies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from tf_dropmax import functional


def class_scale(units: int) -> float:
    """Factor of the default weights of terms that are sums over classes. It is 1 up to 30."""
    return min(1.0, 30 / units)


class TrainingStep(NamedTuple):
    """What a variant may use.

    Attributes:
        logits: Tensor, shape `(..., T)`.
        branch: Function from the name of a branch to its logits, shape `(..., T)`.
        uniform: Function without arguments that draws a tensor of the shape of the logits.
        entropy_weight, temperature, auxiliary_weight, kl_weight: Scalar tensors.
    """

    logits: tf.Tensor
    branch: Callable[[str], tf.Tensor]
    uniform: Callable[[], tf.Tensor]
    entropy_weight: tf.Tensor
    temperature: tf.Tensor
    auxiliary_weight: tf.Tensor
    kl_weight: tf.Tensor


class Variant:
    """What a variant of the head must define.

    Attributes:
        branches: The names of the linear branches that it needs besides the logits.
        warmup_steps: The default of the argument of the head.
    """

    branches: tuple[str, ...] = ()
    warmup_steps = 100

    def scores_and_entropy(self, step: TrainingStep) -> tuple[tf.Tensor, tf.Tensor | None]:
        """The scores and the sum of the mask entropies.

        The scores have shape `(..., T)`. Each is computed as if its class were the label. The sum
        has shape `(...)`. It is `None` if there is no entropy term.
        """
        raise NotImplementedError


class Random(Variant):
    """Random DropMax: hard Bernoulli masks with a fixed retain probability."""

    def __init__(self, retain_probability: float):
        self.retain_probability = retain_probability

    def scores_and_entropy(self, step: TrainingStep) -> tuple[tf.Tensor, None]:
        masks = functional.bernoulli_mask_logits(self.retain_probability, step.uniform())
        return functional.target_log_likelihood(step.logits, masks), None


class Prior(Variant):
    """Adaptive DropMax, eq. (15): relaxed masks from the prior (9)."""

    branches = ("retain",)

    def scores_and_entropy(self, step: TrainingStep) -> tuple[tf.Tensor, tf.Tensor]:
        retain_logits = step.branch("retain")
        masks = functional.relaxed_mask_logits(retain_logits, step.uniform(), step.temperature)
        weights = step.entropy_weight, step.kl_weight
        return functional.prior_scores_and_entropy(step.logits, retain_logits, masks, *weights)


class Attention(Variant):
    """Deterministic attention: eq. (18) with the entropy term. There is no KL divergence."""

    branches = ("retain",)

    def scores_and_entropy(self, step: TrainingStep) -> tuple[tf.Tensor, tf.Tensor]:
        retain_logits = step.branch("retain")
        entropy = functional.mask_entropy(retain_logits)
        log_p = functional.expected_log_probabilities(step.logits, retain_logits)
        return log_p - step.entropy_weight * entropy, tf.reduce_sum(entropy, axis=-1)


class Label(Variant):
    """The label posterior (NeurIPS 2018), with relaxed masks or with their means.

    Args:
        stochastic: Bool. `False` replaces every mask by the posterior retain probability.
    """

    branches = ("retain", "auxiliary")
    warmup_steps = 0  # Else the masks of many classes drop every class in the first steps.

    def __init__(self, stochastic: bool):
        self.stochastic = stochastic

    def scores_and_entropy(self, step: TrainingStep) -> tuple[tf.Tensor, tf.Tensor]:
        retain, auxiliary = step.branch("retain"), step.branch("auxiliary")
        masks = functional.posterior_logits(retain, auxiliary)
        if self.stochastic:
            masks = functional.relaxed_mask_logits(masks, step.uniform(), step.temperature)
        weights = step.auxiliary_weight, step.kl_weight
        return functional.label_scores_and_entropy(step.logits, retain, auxiliary, masks, *weights)


def variant_of(retain_probability: float | None, stochastic: bool, posterior: str) -> Variant:
    """The variant that the arguments of `DropMaxHead` describe.

    Raises:
        ValueError: If the arguments exclude each other.
    """
    if retain_probability is not None:
        if not stochastic or posterior != "prior":
            raise ValueError(
                "A fixed `retain_probability` needs masks from the prior, `stochastic=True` and "
                f"`posterior='prior'`. Received: retain_probability={retain_probability}, "
                f"stochastic={stochastic}, posterior={posterior!r}"
            )
        return Random(retain_probability)
    if posterior == "label":
        return Label(stochastic)
    return Prior() if stochastic else Attention()
