"""The window: Q frozen layers with a trained adapter each, the only autograd graph of the engine.

Dynamic Layer Co-Tuning (ChainFed): adjacent windows share Q - 1 adapters, which carries gradient across layers.
Frozen linears save nothing for the backward pass; with `recompute` only the Q layer inputs are kept and each layer
runs again in backward.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
                hidden = checkpoint(_adapted, layer, adapter, hidden, context, use_reentrant=False)
            else:
                hidden = _adapted(layer, adapter, hidden, context)
        return hidden


def _adapted(layer: Any, adapter: nn.Module, hidden: Tensor, context: Any) -> Tensor:
    output: Tensor = layer(hidden, context, adapter)
    return output
