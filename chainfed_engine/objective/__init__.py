"""Objective of a stage: local loss + auxiliary_weight * auxiliary branch (Globally Perceptive Optimization).

local      task loss of the output layer on the window's last hidden state, carried to the top by the stand-in
auxiliary  the same on that state passed through all later adapters first (adapters alone, no transformer layers)

At the top of the model the loss is the end-to-end loss alone. While no later adapter has been trained the two branches
are the same number, so the head is evaluated once. Later adapters are read, not updated. Source: ChainFed, GPO.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.objective.head import Head, head_losses, weighted_head_loss
from chainfed_engine.objective.stand_in import StandIn
from chainfed_engine.types import IGNORE_INDEX, Batch

RowMap = Callable[[Tensor], Tensor]


class Readout(Protocol):
    """From hidden states float32 [B, T, D] to the task's loss, by way of n rows, one a target."""

    def select(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The tokens that matter, [..., D]: what the auxiliary branch is computed for."""

    def reduce(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Rows [n, D] of selected tokens."""

    def stand_in_rows(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Rows [m, D] that a stand-in is fitted on."""

    def loss(self, branches: Sequence[Tensor], weights: Sequence[float], batch: Batch) -> Tensor:
        """Scalar: the sum over branches [n, D] of weight * mean loss over targets. Raises InvalidArgument for a batch
        without labels."""


@dataclass(frozen=True)
class Objective:
    """`at_top`: the window ends where the model ends; `later`: the trained adapters above it, in order."""

    readout: Readout
    stand_in: StandIn | None
    later: Sequence[RowMap]
    auxiliary_weight: float
    at_top: bool

    def __call__(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Scalar loss of the window's last hidden state [B, T, D]; mean over targets."""
        tokens = self.readout.select(hidden, batch)
        branches, weights = [self._features(tokens, batch)], [1.0]
        if not self.at_top and self.auxiliary_weight:
            if self.later:
                for adapter in self.later:
                    tokens = adapter(tokens)
                branches.append(self._features(tokens, batch))
                weights.append(self.auxiliary_weight)
            else:
                weights[0] += self.auxiliary_weight
        if self.stand_in is not None and self.stand_in.gives_logits:
            return weighted_cross_entropy(branches, weights, require_labels(batch))
        return self.readout.loss(branches, weights, batch)

    def _features(self, tokens: Tensor, batch: Batch) -> Tensor:
        rows = self.readout.reduce(tokens, batch)
        return rows if self.stand_in is None else self.stand_in(rows)


@dataclass(frozen=True)
class ClassificationReadout:
    """Pooling, final norm (pre-norm models), classifier. `classifier(features [B, D]) -> logits [B, C]` is trained."""

    pooling: str
    pool: Callable[[Tensor, Tensor], Tensor]  # hidden [B, T, D], mask [B, T] -> [B, D]
    final_norm: RowMap
    classifier: RowMap

    def select(self, hidden: Tensor, batch: Batch) -> Tensor:
        return hidden if self.pooling == "mean" else self.pool(hidden, batch.attention_mask)

    def reduce(self, tokens: Tensor, batch: Batch) -> Tensor:
        return self.pool(tokens, batch.attention_mask) if self.pooling == "mean" else tokens

    def stand_in_rows(self, hidden: Tensor, batch: Batch) -> Tensor:
        return self.reduce(self.select(hidden, batch), batch)

    def logits(self, features: Tensor) -> Tensor:
        return self.classifier(self.final_norm(features))

    def features(self, hidden: Tensor, batch: Batch) -> Tensor:
        """What the classifier reads, [B, D], of the final hidden state [B, T, D]."""
        return self.final_norm(self.pool(hidden, batch.attention_mask))

    def scores(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses [B] and predicted labels (int64 [B]) of the final hidden state [B, T, D], for evaluation."""
        logits = self.logits(self.pool(hidden, batch.attention_mask))
        return cross_entropy(logits, require_labels(batch), reduction="none"), logits.argmax(dim=-1)

    def loss(self, branches: Sequence[Tensor], weights: Sequence[float], batch: Batch) -> Tensor:
        return weighted_cross_entropy([self.logits(rows) for rows in branches], weights, require_labels(batch))


def class_counts(labels: Tensor, predicted: Tensor, num_labels: int) -> Tensor:
    """Of each class how often it was right, met as a label, and predicted: int64 [3, C], from int64 [B] each."""
    rows = (labels[labels == predicted], labels, predicted)
    return torch.stack([torch.bincount(row.cpu(), minlength=num_labels) for row in rows])


def accuracy_and_macro_f1(counts: Tensor) -> tuple[float, float]:
    """Of `class_counts`. Macro F1: the mean over classes of 2 TP / (2 TP + FP + FN), without those that neither occur
    nor are predicted, as scikit-learn's `f1_score(average="macro")`."""
    right, met, predicted = counts.double()
    there = met + predicted > 0
    f1 = 2 * right[there] / (met + predicted)[there]
    return float(right.sum() / met.sum()), float(f1.mean())


def weighted_cross_entropy(branches: Sequence[Tensor], weights: Sequence[float], labels: Tensor) -> Tensor:
    """Sum over branches of weight * mean cross-entropy of logits [B, C] for labels [B]."""
    losses = [weight * cross_entropy(logits, labels) for logits, weight in zip(branches, weights, strict=True)]
    return torch.stack(losses).sum()


@dataclass(frozen=True)
class CausalReadout:
    """Final norm and the frozen LM head; the token at position t predicts the label at t + 1."""

    final_norm: RowMap
    head: Head

    def select(self, hidden: Tensor, batch: Batch) -> Tensor:
        return hidden[:, :-1][_carries_label(batch)]

    def reduce(self, tokens: Tensor, batch: Batch) -> Tensor:
        return tokens

    def stand_in_rows(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Every token, labelled or not: a row of either kind is worth the same to the fit, and there are more."""
        return hidden[batch.attention_mask.bool()]

    def loss(self, branches: Sequence[Tensor], weights: Sequence[float], batch: Batch) -> Tensor:
        targets = self.targets(batch)
        rows = self.final_norm(torch.cat(list(branches)))
        token_weight = rows.new_tensor(weights).repeat_interleave(len(targets)) / len(targets)
        return weighted_head_loss(rows, targets.repeat(len(branches)), token_weight, self.head)

    def targets(self, batch: Batch) -> Tensor:
        targets = require_labels(batch)[:, 1:][_carries_label(batch)]
        if len(targets) == 0:
            raise InvalidArgument(
                "objective: no token of the batch carries a label; drop such batches or raise sequence_length"
            )
        return targets

    def token_losses(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Losses [num_target_tokens] of the final hidden state [B, T, D], for evaluation."""
        rows = self.final_norm(self.select(hidden, batch)).contiguous()
        return head_losses(rows, self.targets(batch), self.head, token_weight=None)[0]


def require_labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise InvalidArgument("objective: the batch has no labels; give `labels` with every training batch")
    return batch.labels


def _carries_label(batch: Batch) -> Tensor:
    return require_labels(batch)[:, 1:] != IGNORE_INDEX
