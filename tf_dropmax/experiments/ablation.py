"""DropMax with parts of its objective switched off."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_dropmax import DropMaxHead, functional
from tf_dropmax.head.variants import Label, Prior, TrainingStep, Variant


class AblatedHead(DropMaxHead):
    """DropMax with parts of its objective switched off.

    `entropy_weight=0.0` switches off the entropy term, `auxiliary_weight=0.0` the loss of the
    auxiliary classifier.

    Args:
        units: Int of 2 or more, the number of classes T.
        masks: Bool. `False` replaces the masks of the non-targets by their means. Defaults to
            `True`.
        kl: Bool. `False` removes the KL divergence: (10), which is `-log rho_y`, and with
            `posterior="label"` also those of the non-targets. Defaults to `True`.
        beside_softmax: Bool. `True` trains and predicts by the plain softmax (2). The retain branch
            has its entropy term only. `masks`, `kl` and the posterior are then ignored. Defaults to
            `False`.
        **kwargs: Arguments of `DropMaxHead`.
    """

    def __init__(
        self,
        units: int,
        masks: bool = True,
        kl: bool = True,
        beside_softmax: bool = False,
        **kwargs: Any,
    ):
        # Before `super().__init__`, which makes the variant.
        self.masks, self.kl, self.beside_softmax = masks, kl, beside_softmax
        super().__init__(units, predict_mode="softmax" if beside_softmax else "expected", **kwargs)

    def _make_variant(
        self, retain_probability: float | None, stochastic: bool, posterior: str
    ) -> Variant:
        if self.beside_softmax:
            return EntropyBesideSoftmax()
        variant: Variant = Prior() if self.masks else PriorOfMeans()
        if posterior == "label":
            variant = Label(stochastic=self.masks)
        return variant if self.kl else WithoutDivergence(variant)


class PriorOfMeans(Prior):
    """The objective (15) with the means of the masks."""

    def scores_and_entropy(self, step: TrainingStep) -> tuple[tf.Tensor, tf.Tensor]:
        means = step.branch("retain")
        weights = step.entropy_weight, step.kl_weight
        return functional.prior_scores_and_entropy(step.logits, means, means, *weights)


class WithoutDivergence(Variant):
    """Another variant without its KL divergences."""

    def __init__(self, variant: Variant):
        self.variant, self.branches = variant, variant.branches
        self.warmup_steps = variant.warmup_steps

    def scores_and_entropy(self, step: TrainingStep) -> tuple[tf.Tensor, tf.Tensor | None]:
        return self.variant.scores_and_entropy(step._replace(kl_weight=0 * step.kl_weight))


class EntropyBesideSoftmax(Variant):
    """The plain softmax (2), and the entropy term of a retain branch that nothing else uses."""

    branches = ("retain",)

    def scores_and_entropy(self, step: TrainingStep) -> tuple[tf.Tensor, tf.Tensor]:
        entropy = functional.mask_entropy(step.branch("retain"))
        return functional.softmax_log_probabilities(step.logits), tf.reduce_sum(entropy, axis=-1)
