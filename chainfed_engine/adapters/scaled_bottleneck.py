"""The bottleneck adapter of pre-norm models: h + s up(gelu(down(clip(h / s)))), s the root mean square of the row h.

hidden [..., D] in, [..., D] out. In these models a row grows from layer to layer, the first token's to a hundred times
the others', and a few columns hold most of it (SmolLM2-135M: four of 576 columns 55 to 77 % of the energy), so that a
bottleneck on the row itself sees little else. Divided by its root mean square and clipped at `LIMIT` it sees all of
them, as the model's own projections do behind their norm; s makes what is added grow with the row. RMS: Zhang and
Sennrich 2019, arXiv 1910.07467.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from chainfed_engine.adapters.bottleneck import Bottleneck

LIMIT = 3.0  # of the columns of a row whose root mean square is 1
_SMALLEST = 1e-6  # a row of zeros is padding


class ScaledBottleneck(Bottleneck):
    """Parameters as those of `Bottleneck`. Keeps the row and down's output for the backward pass, and no other row."""

    is_fused = False  # the native encoder of the boundary cache has no such adapter

    def forward(self, hidden: Tensor) -> Tensor:
        parameters = (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        out: Tensor = _Scaled.apply(hidden, *parameters)  # type: ignore[no-untyped-call]
        return out


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, down_weight: Tensor, down_bias: Tensor, up_weight: Tensor, up_bias: Tensor
    ) -> Tensor:
        size, read = _read(hidden)
        before = functional.linear(read, down_weight, down_bias)
        ctx.save_for_backward(hidden, before, down_weight, up_weight, up_bias)
        del read
        return functional.linear(functional.gelu(before), up_weight, up_bias).mul_(size).add_(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        hidden, before, down_weight, up_weight, up_bias = ctx.saved_tensors
        size, read = _read(hidden)
        inner = functional.gelu(before)
        by_inner = (grad @ up_weight).mul_(size)
        by_before = by_inner * _gelu_slope(before)
        by_up_weight, by_up_bias = _rows(grad).T @ _rows(inner * size), _rows(grad).T @ _rows(size)[:, 0]
        by_down_weight, by_down_bias = _rows(by_before).T @ _rows(read), _rows(by_before).sum(0)
        by_read = (by_before @ down_weight).masked_fill_(read >= LIMIT, 0).masked_fill_(read <= -LIMIT, 0)
        # What size does: it multiplies what is added, and divides what is read. In place: rows are what memory goes to.
        by_size = (by_inner * inner).sum(-1, keepdim=True).div_(size).add_((grad @ up_bias).unsqueeze(-1))
        by_size -= read.mul_(by_read).sum(-1, keepdim=True).div_(size)
        by_hidden = by_read.div_(size).add_(grad).addcmul_(hidden, by_size / (hidden.shape[-1] * size))
        return by_hidden, by_down_weight, by_down_bias, by_up_weight, by_up_bias


def _read(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The root mean square [..., 1] of each row, and what the adapter reads [..., D]. Half precision would overflow in
    the first token's squares."""
    wide = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    size = wide.square().mean(-1, keepdim=True).sqrt_().clamp_min_(_SMALLEST)
    return size.to(hidden.dtype), (wide / size).clamp_(-LIMIT, LIMIT).to(hidden.dtype)


def _gelu_slope(x: Tensor) -> Tensor:
    """Derivative of the exact GELU."""
    density = torch.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    slope: Tensor = (1 + torch.erf(x * 2**-0.5)) / 2 + x * density
    return slope


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])
