"""The fitted stand-in as a frozen torch map: rows [n, D] at some depth -> rows [n, D] like the final hidden state.

For pre-norm models (Llama-like) rows are first divided by their root mean square: the final norm ignores a row's
length, and without this the few tokens of huge norm would decide the fit.
"""

import torch
from torch import Tensor

from chainfed_engine.types import Arrays, stand_in_key


def unit_rows(rows: Tensor) -> Tensor:
    """Rows [n, D] divided by their root mean square."""
    return rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + 1e-6)


class StandIn:
    """y = W x + b with the arrays of `chainfed_engine.stand_in` for one depth; no gradient to W or b. `gives_logits`:
    the classifier is part of it, rows become [n, C]."""

    @staticmethod
    def holds_classifier(arrays: Arrays, depth: int) -> bool:
        return stand_in_key(depth, "logit_weight") in arrays

    def __init__(self, arrays: Arrays, depth: int, *, normalise: bool) -> None:
        self.normalise = normalise
        self.gives_logits = self.holds_classifier(arrays, depth)
        if self.gives_logits:
            self.bias = torch.from_numpy(arrays[stand_in_key(depth, "logit_bias")])
            self.factors = [torch.from_numpy(arrays[stand_in_key(depth, "logit_weight")])]
            return
        self.bias = torch.from_numpy(arrays[stand_in_key(depth, "bias")])
        weight = arrays.get(stand_in_key(depth, "weight"))
        if weight is not None:
            self.factors = [torch.from_numpy(weight)]
        else:
            names = ("in_weight", "out_weight")
            self.factors = [torch.from_numpy(arrays[stand_in_key(depth, name)]) for name in names]

    def __call__(self, rows: Tensor) -> Tensor:
        rows = unit_rows(rows) if self.normalise else rows
        for factor in self.factors:
            rows = rows @ factor.T.to(rows)
        return rows + self.bias.to(rows)
