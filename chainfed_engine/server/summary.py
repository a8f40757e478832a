"""What one exchange came to: the server's account of a profile pass or a round, for logs and progress. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from chainfed_engine.types import Stage


@dataclass(frozen=True)
class Summary:
    """`kind`: "profile" or "round"; `index`: attempt or round number, from 0; `accepted`: whether the state changed.

    `follows_round`: the round before it, -1 at the start (profile only). `loss`: mean of the counted clients' losses
    weighted by samples, None without one. `totals`: every other metric, summed over the counted clients. `bytes_down`,
    `bytes_up`: bytes of arrays sent to clients and received from them. `silent`: asked and not heard of. `num_late`:
    replies to earlier rounds; `stale`: how many rounds late those of them are that count. `typical_norm`: median root
    mean square change of the cohort's updates.
    """

    kind: Literal["profile", "round"]
    index: int
    accepted: bool
    clients: tuple[str, ...]  # counted, sorted
    rejected: Mapping[str, str]  # client -> reason
    bytes_down: int
    bytes_up: int
    stage: Stage | None = None
    loss: float | None = None
    totals: Mapping[str, float] = field(default_factory=dict)
    start_layer: int | None = None
    scores: tuple[float, ...] = ()  # mean CKA by layer, profile only
    follows_round: int = -1
    silent: tuple[str, ...] = ()
    num_late: int = 0
    stale: Mapping[str, int] = field(default_factory=dict)
    typical_norm: float | None = None


def num_bytes(arrays: object) -> int:
    """Bytes of the arrays among what came; 0 for anything else."""
    values = arrays.values() if isinstance(arrays, Mapping) else ()
    return sum(array.nbytes for array in values if isinstance(array, np.ndarray))
