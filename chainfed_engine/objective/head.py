"""Cross-entropy against the frozen LM head, without logits: loss and gradient of the hidden rows in one pass.

Only rows that carry a label come here. The head is read shard by shard; nothing of size vocabulary exists in memory.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from chainfed_engine import native
from chainfed_engine.model.place import device_of, stream_of


class Head(Protocol):
    """Vocabulary rows in shards; each is leased while it is used."""

    @property
    def activation(self) -> str: ...
    @property
    def block_format(self) -> str: ...
    @property
    def max_shard_rows(self) -> int: ...

    def shards(self) -> Iterable[tuple[native.Matrix, int]]: ...


def head_losses(
    hidden: Tensor, targets: Tensor, head: Head, *, token_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Losses f32 [T] of hidden rows f32 [T, D] for int64 targets [T]; with `token_weight` [T] also the gradient of
    sum(token_weight * loss) by hidden, f32 [T, D]."""
    count, width = hidden.shape
    grad = torch.zeros_like(hidden) if token_weight is not None else None
    target_row = torch.zeros_like(hidden) if token_weight is not None else None
    running_max = hidden.new_full((count,), -torch.inf)
    running_sum, target_logit, losses = (hidden.new_zeros(count) for _ in range(3))
    size = native.cross_entropy_workspace_bytes(head.block_format, count, head.max_shard_rows, width, device_of(hidden))
    workspace = torch.empty(size, dtype=torch.uint8, device=hidden.device)
    stream = stream_of(hidden)
    for shard, first_row in head.shards():
        native.cross_entropy_update(
            shard,
            first_row,
            hidden,
            targets,
            activation=head.activation,
            running_max=running_max,
            running_sum=running_sum,
            target_logit=target_logit,
            grad=grad,
            target_row=target_row,
            workspace=workspace,
            stream=stream,
        )
    native.cross_entropy_finish(
        running_max=running_max,
        running_sum=running_sum,
        target_logit=target_logit,
        token_weight=token_weight,
        loss_out=losses,
        grad=grad,
        target_row=target_row,
        stream=stream,
    )
    return losses, grad


class _WeightedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, token_weight: Tensor, head: Head) -> Tensor:
        losses, grad = head_losses(hidden.detach().contiguous(), targets, head, token_weight=token_weight)
        ctx.save_for_backward(grad)
        return torch.dot(losses, token_weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0], None, None, None


def weighted_head_loss(hidden: Tensor, targets: Tensor, token_weight: Tensor, head: Head) -> Tensor:
    """sum_t token_weight[t] * cross_entropy(hidden[t] W^T, targets[t]), differentiable in hidden [T, D] only."""
    loss: Tensor = _WeightedHeadLoss.apply(hidden, targets, token_weight, head)  # type: ignore[no-untyped-call]
    return loss
