"""Adaptive DropMax with parts of its objective switched off."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tf_dropmax import DropMaxHead, functional
from tf_dropmax.objectives import Objective, TrainingStep


class AblatedHead(DropMaxHead):
    """Adaptive DropMax with parts of its objective (15) switched off.

    `entropy_weight=0.0` switches off the entropy term.

    Args:
        units: Positive int, the number of classes T.
        masks: Bool. `False` replaces the masks of the non-targets by their means. Defaults to
            `True`.
        kl: Bool. `False` removes the KL divergence (10), which is `-log rho_y`. Defaults to
            `True`.
        retain: Bool. `False` trains and predicts by the plain softmax (2). The retain branch has
            its entropy term only. `masks` and `kl` are then ignored. Defaults to `True`.
        **kwargs: Arguments of `DropMaxHead`.
    """

    def __init__(
        self, units: int, masks: bool = True, kl: bool = True, retain: bool = True, **kwargs: Any
    ):
        # Before `super().__init__`, which makes the objective.
        self.masks, self.kl, self.retain = masks, kl, retain
        super().__init__(units, predict_mode="expected" if retain else "softmax", **kwargs)

    def _make_objective(self) -> Objective:
        return PartialObjective(self.masks, self.kl) if self.retain else EntropyBesideSoftmax()


class PartialObjective:
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
        scores, entropy = functional.prior_scores_and_entropy(
            step.logits, retain_logits, masks, step.entropy_weight
        )
        return scores if self.kl else scores - tf.math.log_sigmoid(retain_logits), entropy


class EntropyBesideSoftmax:
    """The plain softmax (2), and the entropy term of a retain branch that nothing else uses."""

    branches = ("retain",)

    def scores_and_entropy(self, step: TrainingStep) -> tuple[tf.Tensor, tf.Tensor]:
        entropy = functional.mask_entropy(step.branch("retain"))
        return functional.softmax_log_probabilities(step.logits), tf.reduce_sum(entropy, axis=-1)
