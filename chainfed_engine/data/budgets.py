"""Clients' memory: who has how many bytes, and who of them can take part.

In: client names, or a column of the training table; out: bytes by client. The practical setting that ChainFed's paper
compares methods in: a client whose memory cannot hold a method is left out of it, with its data.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from chainfed_engine.data.table import Table
from chainfed_engine.errors import DataError, MemoryBudgetExceeded
from chainfed_engine.sizes import format_size, parse_size


def dealt(names: Iterable[str], sizes: Sequence[int], seed: int) -> dict[str, int]:
    """Every size for an equal share of the clients (to within one), shuffled by `seed`."""
    ordered = sorted(names)
    order = np.random.default_rng(seed).permutation(len(ordered))
    return {ordered[client]: sizes[place % len(sizes)] for place, client in enumerate(order)}


def by_column(table: Table, column: str, rows: Mapping[str, Any]) -> dict[str, int]:
    """One size a client from its rows (`rows`: indices by client), bytes or text such as "1GiB"; equal in all of them.

    Raises DataError, naming the row.
    """
    values = table.column(column)
    budgets: dict[str, int] = {}
    for client, indices in rows.items():
        for row in map(int, indices):
            try:
                size = parse_size(values[row])
            except ValueError as error:
                raise DataError(f"{table.where(row)}: column {column!r}: {error}") from None
            if budgets.setdefault(client, size) != size:
                raise DataError(
                    f"{table.where(row)}: column {column!r}: client {client} has {format_size(size)} here and "
                    f"{format_size(budgets[client])} elsewhere; expected one size a client"
                )
    return budgets


def left_out(budgets: Mapping[str, int], needed_bytes: int, method: str) -> dict[str, int]:
    """Clients with less than `needed_bytes`, and what they have. Raises MemoryBudgetExceeded if that is everyone."""
    out = {client: size for client, size in budgets.items() if size < needed_bytes}
    if len(out) == len(budgets):
        raise MemoryBudgetExceeded(
            f"no client can hold the method {method}: it needs {format_size(needed_bytes)}, the largest has "
            f"{format_size(max(budgets.values()))}; raise [federation] client_budgets or lower [memory] budget"
        )
    return out
