"""The linear stand-in: an affine map from the hidden state at some depth to the final one, fitted in closed form.

With it the one final head makes sense at every depth: local loss = head(stand_in(h)). A client sends what least
squares needs and nothing else: the triangular factor R of [X | 1 | Y] = QR, whose R'R are the usual sums X'X, X'Y.
Factors of several clients are merged by stacking. NumPy only, so that the server can solve without torch.

Ridge shrinks towards the identity map where that is the better prior: y - x is fitted, y = x + x W + b.
Source: our own (method.md gives the losses of a trial); the closed form is ordinary ridge regression.
"""

from typing import Any

import numpy as np

from chainfed_engine.errors import InconsistentUpdates
from chainfed_engine.types import Arrays, stand_in_key

Matrix = np.ndarray[Any, Any]


def statistics(depth: int, x: Matrix, y: Matrix) -> Arrays:
    """Least-squares factor of rows x [n, D] -> y [n, D]: float32 [min(n, 2D + 1), 2D + 1] under one key."""
    rows = np.concatenate([x, np.ones((len(x), 1), x.dtype), y], axis=1, dtype=np.float64)
    return {stand_in_key(depth, "factor"): _reduce(rows).astype(np.float32)}


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
    return {key: _reduce(np.concatenate(factors, axis=0)) for key, factors in merged.items()}


def solve(sums: Arrays, *, ridge: float) -> Arrays:
    """Affine maps from merged factors: `weight` float32 [D, D] (or `in_weight` [r, D], `out_weight` [D, r] when only
    r < D / 2 rows were seen) and `bias` [D]; y = x + W x + b. `ridge` is relative to the mean variance of x."""
    solved: Arrays = {}
    for key, factor in sums.items():
        depth = int(key.split(".")[1])
        for name, value in _solve_one(factor.astype(np.float64), ridge).items():
            solved[stand_in_key(depth, name)] = np.ascontiguousarray(value, dtype=np.float32)
    return solved


def _reduce(rows: Matrix) -> Matrix:
    if len(rows) <= rows.shape[1]:
        return rows
    reduced: Matrix = np.linalg.qr(rows, mode="r")
    return reduced


def _solve_one(factor: Matrix, ridge: float) -> Arrays:
    width = (factor.shape[1] - 1) // 2
    # Rotate so that the column of ones sits in the first row alone: the other rows are then centred.
    ones = factor[:, width : width + 1]
    count = float((ones**2).sum())
    mean = (ones.T @ factor) / count
    centred = factor - ones @ mean
    x, y = centred[:, :width], centred[:, width + 1 :]
    mean_x, mean_y = mean[0, :width], mean[0, width + 1 :]
    penalty = ridge * max(float((x**2).sum()) / width, 1e-12)
    residual = y - x
    if 2 * len(x) < width:
        dual = np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), residual)
        delta_mean = (mean_x @ x.T) @ dual
        return {"in_weight": x, "out_weight": dual.T, "bias": mean_y - mean_x - delta_mean}
    weight = np.linalg.solve(x.T @ x + penalty * np.eye(width), x.T @ residual)
    return {"weight": weight.T, "bias": mean_y - mean_x - mean_x @ weight}
