"""Padding left out of a pass: the tokens of all sequences as rows of one, [1, N, D], where work is row by row.

Texts drawn at random for a batch differ in length so much that half of a padded batch is padding. Linears, norms and
adapters do not care which sequence a row is from; attention does, and sees padded sequences again: it is the small part
of a layer's work. In: the attention mask of a right-padded batch; out: rows, and back. B sequences, T positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Of B * T. With more tokens the copies around attention cost what they save, and memory beyond the planner's count.
MOST_TOKENS = 0.7


@dataclass(frozen=True)
class Packing:
    """`rows`: int64 [N], the rows of the flattened [B * T] batch that hold tokens; `shape`: (B, T)."""

    rows: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, tokens: Tensor) -> "Packing | None":
        """For a mask bool [B, T], True = token; None where too little of it is padding."""
        if int(tokens.sum()) > MOST_TOKENS * tokens.numel():
            return None
        return cls(tokens.reshape(-1).nonzero().squeeze(1), (tokens.shape[0], tokens.shape[1]))

    @property
    def positions(self) -> Tensor:
        """int64 [N]: of each row in its sequence."""
        return self.rows % self.shape[1]

    def pack(self, padded: Tensor) -> Tensor:
        """[B, T, ...] -> [1, N, ...]."""
        return padded.flatten(0, 1).index_select(0, self.rows)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """[1, N, ...] -> [B, T, ...], zeros in the padding."""
        padded = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[2:])
        return padded.index_copy(0, self.rows, packed[0]).view(*self.shape, *packed.shape[2:])

    def to(self, device: torch.device) -> "Packing":
        return Packing(self.rows.to(device), self.shape)


@dataclass(frozen=True)
class PackedMask:
    """What a layer of packed rows hands to its attention in the place of the padded batch's mask."""

    packing: Packing
    mask: Tensor | None
