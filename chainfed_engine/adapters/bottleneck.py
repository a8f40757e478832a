"""The bottleneck adapter: h + up(gelu(down(h))), applied to a layer's output.

hidden [..., D] in, [..., D] out; D hidden size, R width. `up` starts at zero, so an untrained adapter is the identity.
The GELU is the exact one (erf), as in the native kernel that fuses the adapter with the boundary cache's encoding.
Source: Houlsby et al. 2019, in the form ChainFed composes without the layers between.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from chainfed_engine.model.arrays import load_module_arrays, module_arrays, seeded
from chainfed_engine.types import Arrays, adapter_key


class Bottleneck(nn.Module):
    """Parameters (f32): down_weight [R,D], down_bias [R], up_weight [D,R], up_bias [D]."""

    low_rank: Mapping[str, Any] = MappingProxyType({})  # nothing inside the layer
    is_fused = True  # with the native encoder of the boundary cache

    def __init__(self, hidden_size: int, width: int, *, layer: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.layer = layer
        bound = hidden_size**-0.5  # nn.Linear's own
        down = torch.empty(width, hidden_size).uniform_(-bound, bound, generator=seeded(seed, layer))
        self.down_weight = nn.Parameter(down)
        self.down_bias = nn.Parameter(torch.zeros(width))
        self.up_weight = nn.Parameter(torch.zeros(hidden_size, width))
        self.up_bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        inner = functional.gelu(functional.linear(hidden, self.down_weight, self.down_bias))
        return hidden + functional.linear(inner, self.up_weight, self.up_bias)

    @property
    def is_trained(self) -> bool:
        """False while the adapter is the identity, whatever `down` holds."""
        return bool(self.up_weight.any()) or bool(self.up_bias.any())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The parameters without gradient, in the order of the native `boundary_encode`'s `adapter`."""
        parameters = (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        down_weight, down_bias, up_weight, up_bias = (parameter.detach() for parameter in parameters)
        return down_weight, down_bias, up_weight, up_bias

    def key(self, name: str) -> str:
        return adapter_key(self.layer, name)

    def state_arrays(self) -> Arrays:
        """f32 copies under `adapters.<layer>.<name>`."""
        return module_arrays(self, self.key)

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over this adapter's entries of `arrays`. Raises InvalidArgument, and then changes nothing."""
        load_module_arrays(self, arrays, self.key)
