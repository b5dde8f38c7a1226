"""DropMax with parts of its objective switched off."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_dropmax import DropMaxHead, functional
from tf_dropmax.head.variants import Label, TrainingStep, Variant


class AblatedHead(DropMaxHead):
    """DropMax with parts of its objective switched off.

    `entropy_weight=0.0` switches off the entropy term, `auxiliary_weight=0.0` the loss of the
    auxiliary classifier.

    Args:
        units: Positive int, the number of classes T.
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
        if posterior == "label":
            return PartialLabel(self.masks, self.kl)
        return PartialPrior(self.masks, self.kl)


class PartialPrior(Variant):
    """The objective (15) with or without drawn masks and the KL divergence.

    Args:
        masks, kl: As for `AblatedHead`.
    """

    branches = ("retain",)

    def __init__(self, masks: bool, kl: bool):
        self.masks, self.kl = masks, kl

    def scores_and_entropy(self, step: TrainingStep) -> tuple[tf.Tensor, tf.Tensor]:
        masks = retain_logits = step.branch("retain")
        if self.masks:
            masks = functional.relaxed_mask_logits(masks, step.uniform(), step.temperature)
        weights = step.entropy_weight, step.kl_weight * float(self.kl)
        return functional.prior_scores_and_entropy(step.logits, retain_logits, masks, *weights)


class PartialLabel(Label):
    """The objective of the label posterior with or without drawn masks and the KL divergence.

    Args:
        masks, kl: As for `AblatedHead`.
    """

    def __init__(self, masks: bool, kl: bool):
        super().__init__(stochastic=masks)
        self.kl = kl

    def scores_and_entropy(self, step: TrainingStep) -> tuple[tf.Tensor, tf.Tensor]:
        step = step._replace(kl_weight=step.kl_weight * float(self.kl))
        return super().scores_and_entropy(step)


class EntropyBesideSoftmax(Variant):
    """The plain softmax (2), and the entropy term of a retain branch that nothing else uses."""

    branches = ("retain",)

    def scores_and_entropy(self, step: TrainingStep) -> tuple[tf.Tensor, tf.Tensor]:
        entropy = functional.mask_entropy(step.branch("retain"))
        return functional.softmax_log_probabilities(step.logits), tf.reduce_sum(entropy, axis=-1)
