"""Which of a cohort's updates are too large to be an honest client's. In: sizes of updates; out: reasons, by client.
Statistics are in statistics.py.

An update's size is the root mean square of what it changes, so that clients that train other numbers of layers
compare. A client with more steps may move further: its allowance grows with its steps over the cohort's median. A
cohort of fewer than `MIN_COHORT` cannot tell who is out of line; it is held against the last cohort that could.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from chainfed_engine.types import Arrays

MIN_COHORT = 3


@dataclass(frozen=True)
class Size:
    """`norm`: root mean square change of a parameter; `steps`: optimizer steps the server asked for."""

    norm: float
    steps: float


def update_norm(update: Arrays, before: Mapping[str, np.ndarray]) -> float:
    """Root mean square of `update - before` over all entries, in float64 (infinite where the sum overflows)."""
    total, count = 0.0, 0
    with np.errstate(over="ignore", invalid="ignore"):
        for key in sorted(update):
            change = update[key].astype(np.float64) - before[key]
            total += float(np.sum(change * change))
            count += change.size
    return float(np.sqrt(total / max(count, 1)))


def typical_size(sizes: Mapping[str, Size], last: Size | None) -> Size | None:
    """Medians of the cohort; `last` where the cohort is too small."""
    if len(sizes) < MIN_COHORT:
        return last
    norm = float(np.median([size.norm for size in sizes.values()]))
    return Size(norm, float(np.median([size.steps for size in sizes.values()])))


def weight_cap(client_samples: Mapping[str, int], limit: float) -> int | None:
    """The largest number of samples that a client may weigh: `limit` medians of all clients' numbers, which nobody
    can verify. None: no limit (0), or too few clients to tell."""
    if not limit or len(client_samples) < MIN_COHORT:
        return None
    return max(1, int(limit * float(np.median(list(client_samples.values())))))


def refuse_norms(sizes: Mapping[str, Size], typical: Size | None, *, limit: float) -> dict[str, str]:
    """Client -> reason for every update larger than `limit` times what is typical; 0: no limit."""
    if typical is None or not limit or not np.isfinite(typical.norm):
        return {}
    reasons: dict[str, str] = {}
    for client, size in sizes.items():
        allowed = limit * typical.norm * max(1.0, size.steps / max(typical.steps, 1.0))
        if not size.norm <= allowed:
            reasons[client] = (
                f"norm: the update changes a parameter by {size.norm:.3g} (root mean square), the cohort's median is "
                f"{typical.norm:.3g}, allowed {allowed:.3g}"
            )
    return reasons
