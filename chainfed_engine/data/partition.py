"""Deal rows to clients: by a column, by Dirichlet over labels (non-IID), or evenly (IID).

Each returns {client name: int64 row indices, ascending}, names sorted, every client with at least one row, the same
for the same seed. Source of the Dirichlet split: Hsu, Qi, Brown 2019, arXiv 1909.06335.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chainfed_engine.data.table import Table
from chainfed_engine.errors import DataError

Rows = npt.NDArray[np.int64]
Partition = dict[str, Rows]


def by_column(table: Table, column: str) -> Partition:
    """One client a distinct value of `column` (text, whole numbers or booleans)."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(table.names(column)):
        rows.setdefault(name, []).append(row)
    return {name: np.array(rows[name], dtype=np.int64) for name in sorted(rows)}


def iid(num_rows: int, num_clients: int, seed: int) -> Partition:
    """Shuffled rows in shares that differ by at most one row."""
    _check_counts(num_rows, num_clients)
    order = np.random.default_rng(seed).permutation(num_rows).astype(np.int64)
    return _named(np.array_split(order, num_clients))


def dirichlet(labels: Sequence[Any] | npt.NDArray[Any], num_clients: int, alpha: float, seed: int) -> Partition:
    """Every label's rows are dealt in proportions drawn from a symmetric Dirichlet(alpha) over the clients.

    Small alpha: a client sees few labels; large alpha: shares become equal. A client that drew nothing takes one row
    from the client that then has most.
    """
    _check_counts(len(labels), num_clients)
    if not alpha > 0 or not np.isfinite(alpha):
        raise DataError(f"dirichlet: expected alpha above 0, got {alpha}")
    rng = np.random.default_rng(seed)
    shares: list[list[Rows]] = [[] for _ in range(num_clients)]
    _, codes = np.unique(np.asarray(labels), return_inverse=True)
    for code in range(int(codes.max()) + 1):
        rows = rng.permutation(np.flatnonzero(codes == code)).astype(np.int64)
        proportions = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.rint(np.cumsum(proportions)[:-1] * len(rows)).astype(np.int64)
        for share, part in zip(shares, np.split(rows, cuts), strict=True):
            share.append(part)
    parts = [np.concatenate(share) for share in shares]
    for client in range(num_clients):
        if not len(parts[client]):
            largest = int(np.argmax([len(part) for part in parts]))
            parts[client], parts[largest] = parts[largest][-1:], parts[largest][:-1]
    return _named(parts)


def hold_out(labels: Sequence[str] | None, num_rows: int, share: float, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and rows to evaluate on, both ascending: `share` of all rows, rounded down; with labels, of each
    label's, and one row more of those whose fraction is largest. A label keeps a row to train on. Raises DataError when
    no row is left for evaluation."""
    rng = np.random.default_rng(seed)
    groups = [np.arange(num_rows)]
    if labels is not None:
        _, codes = np.unique(np.asarray(labels), return_inverse=True)
        groups = [np.flatnonzero(codes == code) for code in range(int(codes.max()) + 1)]
    shuffled = [rng.permutation(rows) for rows in groups]
    counts = np.array([int(share * len(rows)) for rows in groups])
    fractions = np.array([share * len(rows) for rows in groups]) - counts
    fractions[[len(rows) <= count + 1 for rows, count in zip(groups, counts, strict=True)]] = -1.0
    missing = max(0, int(share * num_rows) - int(counts.sum()))  # a hair's rounding must not make it negative
    largest = np.argsort(-fractions, kind="stable")[:missing]
    counts[largest[fractions[largest] > 0]] += 1
    held = np.sort(np.concatenate([rows[:count] for rows, count in zip(shuffled, counts, strict=True)])).astype(
        np.int64
    )
    if not len(held):
        of_labels = "" if labels is None else f" with {len(groups)} labels"
        other_column = ", or correct [data] label: every row has one of its own" if len(groups) == num_rows > 1 else ""
        raise DataError(
            f"hold_out {share}: no row of {num_rows}{of_labels} is left for evaluation; raise it or name [data] eval"
            f"{other_column}"
        )
    return np.setdiff1d(np.arange(num_rows, dtype=np.int64), held), held


def _named(parts: Sequence[Rows]) -> Partition:
    width = max(3, len(str(len(parts) - 1)))
    return {f"client-{index:0{width}d}": np.sort(part) for index, part in enumerate(parts)}


def _check_counts(num_rows: int, num_clients: int) -> None:
    if num_clients < 1:
        raise DataError(f"expected at least one client, got num_clients = {num_clients}")
    if num_rows < num_clients:
        raise DataError(f"{num_rows} rows cannot give each of {num_clients} clients one; lower num_clients")
