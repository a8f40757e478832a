"""The linear stand-in: an affine map from the hidden state at some depth to the final one, fitted in closed form.

With it the one final head makes sense at every depth: local loss = head(stand_in(h)). A client sends what least
squares needs and nothing else: the triangular factor R of [X | 1 | Y] = QR, whose R'R are the usual sums X'X, X'Y.
Factors of several clients are merged by stacking. NumPy only, so that the server can solve without torch.

The penalty is chosen by generalised cross-validation over the rows themselves, which the factor allows exactly.
Source: our own; ordinary ridge regression, Golub, Heath and Wahba 1979 for the penalty.
"""

from typing import Any

import numpy as np

from chainfed_engine.errors import InconsistentUpdates
from chainfed_engine.types import Arrays, stand_in_key

Matrix = np.ndarray[Any, Any]
RIDGES = tuple(10.0**exponent for exponent in np.arange(-4.0, 1.51, 0.25))  # tried by cross-validation


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


def solve(sums: Arrays, *, ridge: float | None = None) -> Arrays:
    """Affine maps from merged factors, y = W x + b: `weight` float32 [D, D], or `in_weight` [r, D] and `out_weight`
    [D, r] when only r < D / 2 rows were seen, and `bias` [D]. `ridge` is relative to the mean squared column of x;
    None chooses it by generalised cross-validation."""
    solved: Arrays = {}
    for key, factor in sums.items():
        depth = int(key.split(".")[1])
        for name, value in _solve_one(factor.astype(np.float64), ridge).items():
            solved[stand_in_key(depth, name)] = np.ascontiguousarray(value, dtype=np.float32)
    return solved


def _reduce(rows: Matrix) -> Matrix:
    if len(rows) <= rows.shape[1]:
        return rows
    return np.asarray(np.linalg.qr(rows, mode="r"))


def _solve_one(factor: Matrix, ridge: float | None) -> Arrays:
    width = (factor.shape[1] - 1) // 2
    ones = factor[:, width : width + 1]  # a rotation of the column of ones: centring works in any rotation
    count = float((ones**2).sum())
    mean = (ones.T @ factor) / count
    centred = factor - ones @ mean
    x, y = centred[:, :width], centred[:, width + 1 :]
    mean_x, mean_y = mean[0, :width], mean[0, width + 1 :]
    left, sizes, right = np.linalg.svd(x, full_matrices=False)
    energy = sizes**2
    scale = max(float(energy.sum()) / width, 1e-12)
    projected = left.T @ y
    if ridge is None:
        ridge = _cross_validated(energy / scale, projected, float((y**2).sum()), count)
    shrunk = (sizes / (energy + ridge * scale))[:, None] * projected  # [r, D]
    bias = mean_y - (mean_x @ right.T) @ shrunk
    if 2 * len(sizes) < width:
        return {"in_weight": right, "out_weight": shrunk.T, "bias": bias}
    return {"weight": (right.T @ shrunk).T, "bias": bias}


def _cross_validated(energy: Matrix, projected: Matrix, total: float, count: float) -> float:
    """The penalty of RIDGES with the least GCV score: residual / (rows - effective parameters)^2."""
    power = (projected**2).sum(axis=1)
    scores = []
    for ridge in RIDGES:
        kept = energy / (energy + ridge)
        residual = total - float(((2.0 - kept) * kept * power).sum())
        freedom = max(count - 1.0 - float(kept.sum()), 1e-9)
        scores.append(residual / freedom**2)
    return float(RIDGES[int(np.argmin(scores))])
