"""What least-squares statistics of a client must be before they may count: sums over hostile rows outweigh everybody.

In: a factor R [n, W] of rows [x | 1 | y] (least_squares.py); out: None or a reason, and how large its rows are. R'R
are sums of squares and products, so the column of ones tells how many rows a client claims, and every column's sum
over that number is a mean square, which all clients of one frozen model have alike. NumPy only.
"""

from collections.abc import Mapping

import numpy as np

from chainfed_engine.least_squares import BLOCK_COLUMNS
from chainfed_engine.server.checks import refuse_array
from chainfed_engine.server.quarantine import MIN_COHORT
from chainfed_engine.update_format import dtype_of_statistics

_TOLERANCE = 1e-2  # of sums over up to a million rows in float32 or float16; a liar gains nothing by it


def num_rows(factor: np.ndarray, ones: int) -> float:
    """Rows behind a factor, by its column of ones."""
    column = factor[:, ones].astype(np.float64)
    return float(column @ column)


def refuse_factor(key: str, factor: object, ones: int, *, width: int, at_most: float, halves: bool) -> str | None:
    """A factor [1 to `width`, `width`] in float32, or float16 where that may come (`halves`), every value finite, of as
    many rows as were asked for at most."""
    height = len(factor) if isinstance(factor, np.ndarray) and factor.ndim == 2 else 0
    dtype = dtype_of_statistics(factor, halves=halves)
    reason = refuse_array(key, factor, shape=(min(max(height, 1), width), width), dtype=dtype)
    if reason is not None:
        return reason
    assert isinstance(factor, np.ndarray)
    return refuse_rows(key, factor, ones, at_most=at_most)


def refuse_rows(key: str, factor: np.ndarray, ones: int, *, at_most: float) -> str | None:
    """The number of rows must be positive and what the client was asked for at most."""
    count = num_rows(factor, ones)
    if not 1 - _TOLERANCE <= count <= at_most * (1 + _TOLERANCE):
        return f"{key}: expected the statistics of 1 to {at_most:.0f} rows, got those of {count:.6g}"
    return None


def refuse_one_hot(key: str, factor: np.ndarray, ones: int) -> str | None:
    """Columns behind `ones` must be labels: every row holds one 1 and else 0."""
    total, labelled, column = num_rows(factor, ones), 0.0, factor[:, ones].astype(np.float64)
    allowed, reason = _TOLERANCE * max(total, 1.0), f"{key}: expected one label a row, got other sums"
    for begin in range(ones + 1, factor.shape[1], BLOCK_COLUMNS):  # all products at once are C x C
        block = factor[:, begin : begin + BLOCK_COLUMNS].astype(np.float64)
        counts = column @ block
        labelled += float(counts.sum())
        for other in range(begin, factor.shape[1], BLOCK_COLUMNS):
            sums = block.T @ factor[:, other : other + BLOCK_COLUMNS].astype(np.float64)
            if np.abs(sums - (np.diag(counts) if other == begin else 0.0)).max() > allowed:
                return reason
    return None if abs(labelled - total) <= allowed else reason


def row_size(factor: np.ndarray, ones: int) -> float:
    """Root mean square of an entry over the rows behind a factor."""
    total = sum(float(np.sum(np.square(row, dtype=np.float64))) for row in factor)  # row by row: factors are large
    return float(np.sqrt(total / max(num_rows(factor, ones), 1e-9) / factor.shape[1]))


def refuse_size(key: str, size: float, typical: float, *, limit: float) -> str | None:
    """The rows of a client against those of its cohort; 0: no limit."""
    if limit and not size <= limit * typical:
        return f"{key}: its rows have a root mean square of {size:.3g}, the cohort's median is {typical:.3g}"
    return None


def refuse_sizes(sizes: Mapping[str, float], key: str, *, limit: float, known: float | None) -> dict[str, str]:
    """Client -> reason. Fewer than `MIN_COHORT` clients are held against `known`, what is typical of earlier ones."""
    typical = float(np.median(list(sizes.values()))) if len(sizes) >= MIN_COHORT else known
    if typical is None:
        return {}
    reasons = {client: refuse_size(key, sizes[client], typical, limit=limit) for client in sorted(sizes)}
    return {client: reason for client, reason in reasons.items() if reason is not None}
