"""The classification head: pool the hidden states of a sequence, an optional transform, one linear.

hidden [B,T,D] and attention_mask [B,T] in, logits [B,C] out. It is the one part of the base that is trained and sent
along with the window's adapters. It starts as the checkpoint's own head where that has the same labels.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.model.arrays import load_module_arrays, module_arrays, seeded
from chainfed_engine.model.families.base import Pooling
from chainfed_engine.types import Arrays, classifier_key

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": functional.relu}


def pool(hidden: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector a sequence, [B,T,D] -> [B,D]: the mean over its tokens, its first or its last token."""
    if pooling == "first":
        return hidden[:, 0]
    lengths = attention_mask.sum(dim=1)
    if pooling == "last":
        return hidden[torch.arange(hidden.shape[0]), lengths - 1]
    if pooling != "mean":
        raise InvalidArgument(f"pooling: expected 'mean', 'first' or 'last', got {pooling!r}")
    # A product with the mask would make a copy of hidden; the batched matrix product does not.
    total = torch.bmm(attention_mask.to(hidden.dtype)[:, None], hidden)[:, 0]
    return total / lengths[:, None]


class Classifier(nn.Module):
    """Parameters (f32): out_weight [C,D], with `bias` out_bias [C]; with a transform transform_weight [D,D],
    transform_bias [D]. Decoders have no bias, as in the library, so that what was trained fits into its model.

    Seeded start: weights normal with deviation 0.02, biases zero.
    """

    transform_weight: nn.Parameter | None
    transform_bias: nn.Parameter | None
    out_bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        pooling: Pooling,
        *,
        transform: Literal["tanh", "relu"] | None = None,
        bias: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_labels < 1:
            raise InvalidArgument(f"num_labels: expected 1 or more, got {num_labels}")
        self.pooling: Pooling = pooling
        self.transform = transform
        generator = seeded(seed)
        if transform is None:
            self.register_parameter("transform_weight", None)
            self.register_parameter("transform_bias", None)
        else:
            square = torch.empty(hidden_size, hidden_size)
            self.transform_weight = nn.Parameter(square.normal_(0.0, 0.02, generator=generator))
            self.transform_bias = nn.Parameter(torch.zeros(hidden_size))
        out = torch.empty(num_labels, hidden_size)
        self.out_weight = nn.Parameter(out.normal_(0.0, 0.02, generator=generator))
        self.register_parameter("out_bias", nn.Parameter(torch.zeros(num_labels)) if bias else None)

    @property
    def num_labels(self) -> int:
        return int(self.out_weight.shape[0])

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """[B,T,D] -> the features [B,D] that `score` reads."""
        return pool(hidden, attention_mask, self.pooling)

    def score(self, pooled: Tensor) -> Tensor:
        """Features [B,D] -> logits [B,C]."""
        return functional.linear(self.transformed(pooled), self.out_weight, self.out_bias)

    def transformed(self, pooled: Tensor) -> Tensor:
        """Features [B,D] -> what the last linear reads, [B,D]."""
        if self.transform is None:
            return pooled
        assert self.transform_weight is not None
        return _ACTIVATIONS[self.transform](functional.linear(pooled, self.transform_weight, self.transform_bias))

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return self.score(self.pool(hidden, attention_mask))

    def state_arrays(self) -> Arrays:
        """f32 copies under `classifier.<name>`."""
        return module_arrays(self, classifier_key)

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over the classifier's entries of `arrays`. Raises InvalidArgument, and then changes nothing."""
        load_module_arrays(self, arrays, classifier_key)
