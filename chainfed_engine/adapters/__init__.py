"""Trainable additions to a frozen layer: the bottleneck adapter (default) and LoRA.

Both start as the exact identity, are seeded by run seed and layer, carry their parameters under `types.adapter_key`,
and act through `FrozenLayer(hidden, context, adapter)`: a bottleneck on the layer's output, LoRA inside the attention.
In pre-norm models the bottleneck reads rows at unit size (`scaled_bottleneck.py`).
"""

from typing import Literal

from chainfed_engine.adapters.bottleneck import Bottleneck
from chainfed_engine.adapters.lora import LoRA
from chainfed_engine.adapters.scaled_bottleneck import ScaledBottleneck
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.model.families.base import Family
from chainfed_engine.types import ModelShape

__all__ = ["Adapter", "AdapterKind", "Bottleneck", "LoRA", "ScaledBottleneck", "build_adapter"]

AdapterKind = Literal["bottleneck", "lora"]
Adapter = Bottleneck | LoRA


def build_adapter(kind: AdapterKind, family: Family, shape: ModelShape, layer: int, size: int, seed: int) -> Adapter:
    """The untrained adapter of layer `layer`; `size` is the bottleneck's width or LoRA's rank."""
    if size < 1:
        raise InvalidArgument(f"adapter size: expected 1 or more, got {size}; raise [chain] adapter_size")
    if kind == "bottleneck":
        bottleneck = ScaledBottleneck if family.is_pre_norm else Bottleneck
        return bottleneck(shape.hidden_size, size, layer=layer, seed=seed)
    if kind == "lora":
        return LoRA.for_layer(family, shape, rank=size, layer=layer, seed=seed)
    raise InvalidArgument(f"adapter: expected 'bottleneck' or 'lora', got {kind!r}")
