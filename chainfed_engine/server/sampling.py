"""Who takes part in a round and with which seed: pure functions of (seed, round), so that a resumed run agrees.

In: client names in any order, non-negative numbers. Out: names in sorted order, seeds below 2**63.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

PROFILE_STREAM, ROUND_STREAM = 0, 1  # separate random streams: profiling must not change who trains
LAYER_STREAM, RANK_STREAM, DEAL_STREAM = 2, 3, 4  # FedRA's layers, FLoRA's ranks, rows of the closed form


def sample_clients(names: Iterable[str], count: int, *, seed: int, stream: int, index: int) -> list[str]:
    """`count` distinct names, sorted; all of them when there are no more than `count`. Independent of history."""
    ordered = sorted(names)
    if count >= len(ordered):
        return ordered
    generator = np.random.Generator(np.random.PCG64([seed, stream, index]))
    chosen = generator.choice(len(ordered), size=count, replace=False)
    return [ordered[position] for position in sorted(chosen.tolist())]


def client_seed(seed: int, stream: int, index: int, client: str) -> int:
    """Seed of one client in one round: the first 63 bits of a SHA-256, so that neighbours have nothing in common."""
    digest = hashlib.sha256(f"{seed}/{stream}/{index}/{client}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
