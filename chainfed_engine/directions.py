"""Random directions in parameter space that travel as a seed: client and server draw the same float32 numbers.

In: shapes by key, a seed. Out: one standard normal array a key, float32. NumPy alone, so that the server can rebuild
what a client walked along (MeZO's trick; Malladi et al. 2023, arXiv 2305.17333).
"""

import hashlib
from collections.abc import Mapping

import numpy as np

from chainfed_engine.types import Arrays


def direction(seed: int, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Standard normal float32 arrays of `shapes`; the same for the same seed and shapes, in whatever order given."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return {key: generator.standard_normal(shapes[key], dtype=np.float32) for key in sorted(shapes)}


def candidate_seed(run_seed: int, index: int) -> int:
    """Seed number `index` of a run's fixed set (FedKSeed): every site derives it, none is sent."""
    digest = hashlib.sha256(f"{run_seed}/direction/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def walk(origin: Mapping[str, np.ndarray], coefficients: np.ndarray, run_seed: int) -> Arrays:
    """origin + sum_j coefficients[j] * direction(candidate_seed(j)): float32, the same bits wherever it is computed.

    `coefficients` float32 [K]; a zero costs nothing.
    """
    place = {key: np.array(array, np.float32) for key, array in origin.items()}
    shapes = {key: array.shape for key, array in place.items()}
    for index in np.flatnonzero(coefficients):
        for key, step in direction(candidate_seed(run_seed, int(index)), shapes).items():
            step *= np.float32(coefficients[index])
            place[key] += step
    return place
