"""The window: Q frozen layers with a trained adapter each, the only autograd graph of the engine.

Dynamic Layer Co-Tuning (ChainFed): adjacent windows share Q - 1 adapters, which carries gradient across layers.
Frozen linears save nothing for the backward pass; with `recompute` only the Q layer inputs are kept and each layer
runs again in backward.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chainfed_engine.adapters import Adapter
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.types import Window


class TrainedWindow(nn.Module):
    """`forward(boundary [B, T, D], context) -> hidden [B, T, D]` through layers `window.layers` and their adapters."""

    def __init__(
        self, model: FrozenModel, window: Window, adapters: Mapping[int, Adapter], *, recompute: bool = False
    ) -> None:
        super().__init__()
        self.window, self.recompute = window, recompute
        # Where the ring has slots to spare the window's layers stay in them: the head's shards would evict them twice
        # a step.
        self._pins = model.store.pin_layers(window.layers)
        self.layers = [model.layer(index) for index in window.layers]
        self.adapters = nn.ModuleList([adapters[index] for index in window.layers])

    def close(self) -> None:
        """Let the ring have the layers' slots."""
        for pin in self._pins:
            pin.release()
        self._pins = []

    def forward(self, hidden: Tensor, context: Any) -> Tensor:
        for layer, adapter in zip(self.layers, self.adapters, strict=True):
            if self.recompute:
                hidden = _Recomputed.apply(layer, adapter, context, hidden, *adapter.parameters())  # type: ignore[no-untyped-call]
            else:
                hidden = _adapted(layer, adapter, hidden, context)
        return hidden


def _adapted(layer: Any, adapter: nn.Module, hidden: Tensor, context: Any) -> Tensor:
    output: Tensor = layer(hidden, context, adapter)
    return output


class _Recomputed(torch.autograd.Function):
    """A layer that keeps its input alone and runs again in backward. torch's checkpoint does the same for functions
    that draw random numbers, and imports the compiler."""

    @staticmethod
    def forward(ctx: Any, layer: Any, adapter: nn.Module, context: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.run, ctx.parameters = (layer, adapter, context), parameters
        return _adapted(layer, adapter, hidden, context)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        layer, adapter, context = ctx.run
        needed = ctx.needs_input_grad[3:]
        with torch.enable_grad():
            hidden = ctx.saved_tensors[0].detach().requires_grad_(needed[0])
            output = _adapted(layer, adapter, hidden, context)
            # A scalar of the same gradients: given `grad_outputs`, torch imports symbolic algebra to compare shapes.
            product = torch.dot(output.reshape(-1), grad_out.reshape(-1))
        inputs = [value for value, wanted in zip((hidden, *ctx.parameters), needed, strict=True) if wanted]
        grads = iter(torch.autograd.grad(product, inputs, allow_unused=True))
        return None, None, None, *(next(grads) if wanted else None for wanted in needed)
