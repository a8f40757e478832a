"""The linear stand-in: an affine map from the hidden state at some depth to the final one, fitted in closed form.

With it the one final head makes sense at every depth: local loss = head(stand_in(h)). A client sends the least-squares
factor of its rows (`least_squares.py`); the server merges and solves. NumPy only. Source: our own.
"""

from typing import Any

import numpy as np

from chainfed_engine import least_squares
from chainfed_engine.errors import InconsistentUpdates
from chainfed_engine.types import Arrays, stand_in_key

Matrix = np.ndarray[Any, Any]
BATCHES = 16  # of all clients together; a map of D x D numbers wants as many rows as it can get
_GROUP_BYTES = 32 << 20  # float32 statistics of one exchange
_ROW_BYTES = 64 << 20  # float32 rows of all clients together, for one depth
_SQUARED_WIDTH_ROWS = 1 << 34  # rows times D squared: bounds the solution of wide models, two factors [rows, D]


def depths_at_once(hidden_size: int) -> int:
    """How many depths' statistics one exchange may carry: 6 for D = 576, one for D = 4096."""
    return int(max(1, _GROUP_BYTES // (4 * (2 * hidden_size + 1) ** 2)))


def rows_in_all(hidden_size: int) -> int:
    """How many rows all clients together may give for one depth: 14551 for D = 576, 1024 for D = 4096."""
    return max(1, min(_ROW_BYTES // (4 * (2 * hidden_size + 1)), _SQUARED_WIDTH_ROWS // hidden_size**2))


def statistics(depth: int, x: Matrix, y: Matrix) -> Arrays:
    """Least-squares factor of rows x [n, D] -> y [n, D]: float32 [min(n, 2D + 1), 2D + 1] under one key."""
    return {stand_in_key(depth, "factor"): least_squares.factor(x, y).astype(np.float32, copy=False)}


def merge(parts: list[Arrays]) -> Arrays:
    """Stack the factors of several clients, in the order given; keys must agree."""
    merged: dict[str, list[Matrix]] = {}
    for part in parts:
        for key, factor in part.items():
            merged.setdefault(key, []).append(factor)
    for key, factors in merged.items():
        widths = {factor.shape[1:] for factor in factors}
        if len(factors) != len(parts) or len(widths) != 1:
            raise InconsistentUpdates(f"stand-in statistics: {key} differs between clients: shapes {sorted(widths)}")
    return {key: least_squares.merge(factors) for key, factors in merged.items()}


def solve(sums: Arrays, *, ridge: float | None = None) -> Arrays:
    """Affine maps from merged factors, y = W x + b: `weight` float32 [D, D], or `in_weight` [r, D] and `out_weight`
    [D, r] when only r < D / 2 rows were seen, and `bias` [D]. `ridge` is relative to the mean squared column of x;
    None chooses it by generalised cross-validation."""
    solved: Arrays = {}
    for key, factor in sums.items():
        depth = int(key.split(".")[1])
        for name, value in _solve_one(factor, ridge).items():
            solved[stand_in_key(depth, name)] = np.ascontiguousarray(value, dtype=np.float32)
    return solved


def _solve_one(factor: Matrix, ridge: float | None) -> Arrays:
    width = (factor.shape[1] - 1) // 2
    fitted = least_squares.solve(factor, width, ridge=ridge)
    if 2 * len(fitted.in_weight) < width:
        return {"in_weight": fitted.in_weight, "out_weight": fitted.out_weight, "bias": fitted.bias}
    return {"weight": fitted.weight, "bias": fitted.bias}
