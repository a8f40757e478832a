"""LoRA on a layer's query and value projections: W x becomes W x + (alpha / rank) B A x.

x [..., K] in, an addition [..., N] out for each of the two projections; rank R. B starts at zero, so an untrained
adapter is the identity. LoRA lives inside the attention: applied to a layer's output it is the identity, which means
that it cannot stand in for a layer that is not loaded. Source: Hu et al. 2021.
"""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from chainfed_engine.model.arrays import load_module_arrays, module_arrays, seeded
from chainfed_engine.model.families.base import Family
from chainfed_engine.types import Arrays, ModelShape, adapter_key


class LowRankBranch:
    """One projection's addition. Holds the parameters of the `LoRA` it belongs to, not copies of them."""

    def __init__(self, a: nn.Parameter, b: nn.Parameter, scale: float, base: nn.Parameter | None = None) -> None:
        self.a, self.b, self.scale, self.base = a, b, scale, base

    def __call__(self, x: Tensor) -> Tensor:
        added = functional.linear(functional.linear(x, self.a), self.b) * self.scale
        return added if self.base is None else added + functional.linear(x, self.base)


class LoRA(nn.Module):
    """Parameters (f32): query_a [R,K], query_b [Nq,R], value_a [R,K], value_b [Nv,R].

    `targets`: the layer's paths of the query and the value projection, as the family names them.
    """

    def __init__(
        self,
        rank: int,
        alpha: float,
        *,
        targets: tuple[str, str],
        hidden_size: int,
        query_size: int,
        value_size: int,
        layer: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layer, self.rank, self.alpha, self.scale = layer, rank, alpha, alpha / rank
        self.targets = targets
        generator = seeded(seed, layer)
        bound = hidden_size**-0.5  # nn.Linear's own
        self.query_a = nn.Parameter(torch.empty(rank, hidden_size).uniform_(-bound, bound, generator=generator))
        self.query_b = nn.Parameter(torch.zeros(query_size, rank))
        self.value_a = nn.Parameter(torch.empty(rank, hidden_size).uniform_(-bound, bound, generator=generator))
        self.value_b = nn.Parameter(torch.zeros(value_size, rank))

    @classmethod
    def for_layer(cls, family: Family, shape: ModelShape, *, rank: int, layer: int, seed: int) -> Self:
        """LoRA of `shape`'s projections, with alpha = 2 * rank (a scale of 2 at every rank)."""
        query, value = family.lora_targets
        return cls(
            rank,
            2.0 * rank,
            targets=(query, value),
            hidden_size=shape.hidden_size,
            query_size=shape.num_heads * shape.head_dim,
            value_size=shape.num_kv_heads * shape.head_dim,
            layer=layer,
            seed=seed,
        )

    @property
    def low_rank(self) -> Mapping[str, LowRankBranch]:
        """Path of a projection inside the layer -> what is added to its output."""
        query, value = self.targets
        return {
            query: LowRankBranch(self.query_a, self.query_b, self.scale),
            value: LowRankBranch(self.value_a, self.value_b, self.scale),
        }

    def forward(self, hidden: Tensor) -> Tensor:
        """The identity: nothing acts on the layer's output."""
        return hidden

    @property
    def is_trained(self) -> bool:
        """False while the adapter is the identity, whatever A holds."""
        return bool(self.query_b.any()) or bool(self.value_b.any())

    def key(self, name: str) -> str:
        return adapter_key(self.layer, name)

    def state_arrays(self) -> Arrays:
        """f32 copies under `adapters.<layer>.<name>`."""
        return module_arrays(self, self.key)

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over this adapter's entries of `arrays`. Raises InvalidArgument, and then changes nothing."""
        load_module_arrays(self, arrays, self.key)


class BasedLoRA(LoRA):
    """LoRA on top of a dense, frozen addition to each projection: query_base [Nq,K], value_base [Nv,K], zero at first.

    FLoRA adds every round's products there, since the quantised weights themselves stay as they are.
    """

    def __init__(
        self, rank: int, alpha: float, *, hidden_size: int, query_size: int, value_size: int, **rest: Any
    ) -> None:
        super().__init__(rank, alpha, hidden_size=hidden_size, query_size=query_size, value_size=value_size, **rest)
        self.query_base = nn.Parameter(torch.zeros(query_size, hidden_size), requires_grad=False)
        self.value_base = nn.Parameter(torch.zeros(value_size, hidden_size), requires_grad=False)

    @property
    def bases(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.query_base, self.value_base

    @property
    def low_rank(self) -> Mapping[str, LowRankBranch]:
        query, value = self.targets
        return {
            query: LowRankBranch(self.query_a, self.query_b, self.scale, self.query_base),
            value: LowRankBranch(self.value_a, self.value_b, self.scale, self.value_base),
        }

    @property
    def is_trained(self) -> bool:
        return super().is_trained or any(bool(base.any()) for base in self.bases)

    def fresh_factors(self, rank: int, seed: int) -> Arrays:
        """Untrained factors of a lower rank, f32 by name: A random in its first `rank` rows, everything else zero."""
        generator = seeded(seed, self.layer)
        arrays: Arrays = {}
        for name in ("query", "value"):
            a, b = getattr(self, f"{name}_a"), getattr(self, f"{name}_b")
            bound = a.shape[1] ** -0.5
            rows = torch.zeros(a.shape)
            rows[:rank].uniform_(-bound, bound, generator=generator)
            arrays[f"{name}_a"], arrays[f"{name}_b"] = rows.numpy(), torch.zeros(b.shape).numpy()
        return arrays
