"""Central differential privacy of a round: every client's change is clipped, the sum gets Gaussian noise.

In: checked updates and what they are measured from; out: new float32 values. The influence of a client on the sum is at
most `clip` (L2 over all it trained); every coordinate of the sum gets noise of standard deviation `noise * clip`;
the sum is divided by the number of clients asked, which does not depend on who answered. All clients weigh the same.
The noise is drawn from a key that only the server has, so that a run that is taken up again draws the same. Source:
McMahan et al., 2018, "Learning Differentially Private Recurrent Language Models", ICLR, arXiv 1710.06963.
"""

import hashlib
from collections.abc import Mapping

import numpy as np

from chainfed_engine.types import Arrays, Reply


def private_average(
    replies: Mapping[str, Reply],
    before: Mapping[str, np.ndarray],
    *,
    asked: int,
    clip: float,
    noise: float,
    key: bytes,
    round_id: int,
) -> Arrays:
    """`before`: every parameter of the round as it was; those that no reply holds get noise as well, for who answered
    must not show. `asked`: clients of the round, at least one."""
    sums = {name: np.zeros(array.shape, np.float64) for name, array in before.items()}
    for client in sorted(replies):
        update = replies[client].arrays
        change = {name: update[name].astype(np.float64) - before[name] for name in sorted(update)}
        length = float(np.sqrt(sum(float(np.sum(part * part)) for part in change.values())))
        factor = 1.0 if length <= clip else clip / length
        for name, part in change.items():
            sums[name] += factor * part
    moved: Arrays = {}
    for name in sorted(sums):
        drawn = _generator(key, round_id, name).normal(scale=noise * clip, size=sums[name].shape)
        moved[name] = np.asarray(before[name] + (sums[name] + drawn) / asked, dtype=np.float32)
    return moved


def _generator(key: bytes, round_id: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(key + f"/{round_id}/{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
