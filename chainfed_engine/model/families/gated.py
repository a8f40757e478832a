"""The decoders' feed-forward part, down(silu(gate(x)) * up(x)), with a product that keeps its two factors alone.

The library's keeps silu(gate) as well, a fifth of all that a layer holds for the backward pass. It is one cheap
elementwise function of what is kept, so backward computes it again. Where no gradient passes (below a window's first
adapter, in the prefix) the product takes the gate's place. Results are the library's, bit for bit.
B sequences, T positions, D hidden, I intermediate.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class GatedMlp(nn.Module):
    """Takes the place of the library's module and its projections: x [B,T,D] -> [B,T,D]."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.requires_grad or up.requires_grad:
            product = _GatedProduct.apply(gate, up)  # type: ignore[no-untyped-call]
        else:
            product = functional.silu(gate, inplace=True).mul_(up)
        del gate, up  # before the last projection makes its result
        return self.down_proj(product)  # type: ignore[no-any-return]


class _GatedProduct(torch.autograd.Function):
    """silu(gate) * up, both [B,T,I]."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, functional.silu(gate).mul_(grad)
