"""One array out of many updates of it. In: checked float32 updates by client; out: new float32 arrays.

Every key is combined over the clients that trained it: clients with windows of other sizes take part in one round. Sums
run in float64 in the order of the clients' names, so that the result does not depend on who answered first.
`mean` weights by samples (McMahan et al., 2017, FedAvg). The others bound what hostile clients can do and therefore
do not believe anybody's number of samples, except `multi-krum` once it has chosen: `median` and `trimmed-mean`
coordinate by coordinate (Yin et al., 2018), `multi-krum` (Blanchard et al., 2017) the updates that lie closest.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from chainfed_engine.types import Arrays, Reply


def aggregate(method: str, replies: Mapping[str, Reply], *, hostile_share: float) -> Arrays:
    """`method`: a name of `[federation] aggregation`. Every key that any of the replies holds."""
    if method in ("mean", "multi-krum"):
        return federated_average(replies)
    combined: Arrays = {}
    for key, ordered in _by_key(replies).items():
        stacked = np.stack([reply.arrays[key] for reply in ordered])
        if method == "median":
            combined[key] = np.asarray(np.median(stacked, axis=0), dtype=np.float32)
        else:
            combined[key] = _trimmed_mean(stacked, hostile_share)
    return combined


def federated_average(replies: Mapping[str, Reply]) -> Arrays:
    """Mean over clients weighted by `num_samples`; of one client, its update bit for bit."""
    averaged: Arrays = {}
    for key, ordered in _by_key(replies).items():
        total = float(sum(reply.num_samples for reply in ordered))
        # The sum starts at the first term, not at zero: 0.0 + -0.0 would lose the sign of a zero.
        weighted = ordered[0].arrays[key].astype(np.float64) * ordered[0].num_samples
        for reply in ordered[1:]:
            weighted += reply.arrays[key].astype(np.float64) * reply.num_samples
        averaged[key] = np.asarray(weighted / total, dtype=np.float32)
    return averaged


def krum_outsiders(replies: Mapping[str, Reply], *, hostile_share: float) -> list[str]:
    """The clients that multi-Krum leaves out: as many as are taken to be hostile, those whose squared distances to
    their n - f - 2 nearest neighbours sum up highest. Only updates of the same parameters compare; fewer than four of
    them have no neighbourhood to judge by, and none is left out."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for client in sorted(replies):
        groups.setdefault(tuple(sorted(replies[client].arrays)), []).append(client)
    outsiders: list[str] = []
    for keys, clients in groups.items():
        num_hostile = min(num_trimmed(len(clients), hostile_share), (len(clients) - 3) // 2)
        if num_hostile < 1:
            continue
        distances = _squared_distances([replies[client].arrays for client in clients], keys)
        nearest = np.sort(distances, axis=1)[:, 1 : len(clients) - num_hostile - 1]
        ranked = sorted(zip(nearest.sum(axis=1), clients, strict=True))
        outsiders += [client for _, client in ranked[len(clients) - num_hostile :]]
    return sorted(outsiders)


def num_trimmed(count: int, hostile_share: float) -> int:
    """How many of `count` are taken to be hostile: rounded up, so that a share above zero always means someone."""
    return int(np.ceil(count * hostile_share - 1e-9))


def _by_key(replies: Mapping[str, Reply]) -> dict[str, list[Reply]]:
    """Every key with the replies that hold it, in name order."""
    keys: dict[str, list[Reply]] = {}
    for name in sorted(replies):
        for key in replies[name].arrays:
            keys.setdefault(key, []).append(replies[name])
    return keys


def _trimmed_mean(stacked: np.ndarray, hostile_share: float) -> np.ndarray:
    """Mean of [clients, ...] without the lowest and the highest of every coordinate; at least one value stays."""
    cut = min(num_trimmed(len(stacked), hostile_share), (len(stacked) - 1) // 2)
    kept = np.sort(stacked, axis=0)[cut : len(stacked) - cut]
    return np.asarray(kept.mean(axis=0, dtype=np.float64), dtype=np.float32)


def _squared_distances(updates: Sequence[Arrays], keys: Sequence[str]) -> np.ndarray:
    """float64 [n, n], summed key by key: never more than one key of all updates beside the updates themselves."""
    distances = np.zeros((len(updates), len(updates)))
    for key in keys:
        flat = np.stack([update[key].ravel() for update in updates]).astype(np.float64)
        for index, row in enumerate(flat):
            distances[index] += np.square(flat - row).sum(axis=1)
    return distances
