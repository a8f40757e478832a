"""Federated averaging of checked updates. In: float32 arrays of equal keys and shapes; out: new float32 arrays.

Sums run in float64 in the order of the clients' names, so that the result does not depend on who answered first.
Source: McMahan et al., 2017 (FedAvg), over the stage's trained parameters only (ChainFed).
"""

from collections.abc import Mapping

import numpy as np

from chainfed_engine.types import Arrays, Reply


def federated_average(replies: Mapping[str, Reply]) -> Arrays:
    """Mean over clients weighted by `num_samples`; of one client, its update bit for bit."""
    ordered = [replies[name] for name in sorted(replies)]
    total = float(sum(reply.num_samples for reply in ordered))
    averaged: Arrays = {}
    for key in ordered[0].arrays:
        # The sum starts at the first term, not at zero: 0.0 + -0.0 would lose the sign of a zero.
        weighted = ordered[0].arrays[key].astype(np.float64) * ordered[0].num_samples
        for reply in ordered[1:]:
            weighted += reply.arrays[key].astype(np.float64) * reply.num_samples
        averaged[key] = np.asarray(weighted / total, dtype=np.float32)
    return averaged
