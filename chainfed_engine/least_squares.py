"""Affine least squares from rows that lie on many sites: a factor a site, merged by stacking, solved in one place.

A site sends what least squares needs and nothing else: the triangular factor R of [X | 1 | Y] = QR, whose R'R are the
usual sums X'X, X'Y, Y'Y. It has no more rows than the site has samples, so a small site sends a rotation of its own
rows: such statistics are no protection of the features. NumPy only, so that the server can solve without torch.

The penalty is chosen by generalised cross-validation over the rows themselves, which the factor allows exactly.
Source: ordinary ridge regression; Golub, Heath and Wahba 1979 for the penalty.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Matrix = np.ndarray[Any, Any]
RIDGES = tuple(10.0**exponent for exponent in np.arange(-4.0, 1.51, 0.25))  # tried by cross-validation
# With effective parameters close to the number of rows the cross-validation score is 0/0 and picks interpolation.
MAX_FREEDOM_SHARE = 0.7


def factor(x: Matrix, y: Matrix) -> Matrix:
    """float64 [min(n, W), W] of rows x [n, Dx] -> y [n, Dy], W = Dx + 1 + Dy."""
    return reduce_rows(np.concatenate([x, np.ones((len(x), 1), x.dtype), y], axis=1, dtype=np.float64))


def merge(factors: Sequence[Matrix]) -> Matrix:
    """One factor of the rows of all; of equal width, in the order given (which fixes the bits)."""
    return reduce_rows(np.concatenate(factors, axis=0, dtype=np.float64))


def reduce_rows(rows: Matrix) -> Matrix:
    """At most as many rows as columns, with the same sums of squares and products."""
    return rows if len(rows) <= rows.shape[1] else np.asarray(np.linalg.qr(rows, mode="r"))


@dataclass(frozen=True)
class Affine:
    """y = out_weight (in_weight x) + bias: `in_weight` [r, Dx], `out_weight` [Dy, r], `bias` [Dy], float64."""

    in_weight: Matrix
    out_weight: Matrix
    bias: Matrix

    @property
    def weight(self) -> Matrix:
        """[Dy, Dx]."""
        return np.asarray(self.out_weight @ self.in_weight)


def solve(merged: Matrix, x_width: int, *, ridge: float | None = None) -> Affine:
    """The ridge solution for a factor whose first `x_width` columns are x. `ridge` is relative to the mean squared
    column of x; None chooses it by generalised cross-validation."""
    merged = merged.astype(np.float64)
    ones = merged[:, x_width : x_width + 1]  # a rotation of the column of ones: centring works in any rotation
    count = float((ones**2).sum())
    mean = (ones.T @ merged) / count
    centred = merged - ones @ mean
    x, y = centred[:, :x_width], centred[:, x_width + 1 :]
    mean_x, mean_y = mean[0, :x_width], mean[0, x_width + 1 :]
    left, sizes, right = np.linalg.svd(x, full_matrices=False)
    energy = sizes**2
    scale = max(float(energy.sum()) / x_width, 1e-12)
    projected = left.T @ y
    if ridge is None:
        ridge = _cross_validated(energy / scale, projected, float((y**2).sum()), count)
    shrunk = (sizes / (energy + ridge * scale))[:, None] * projected  # [r, Dy]
    return Affine(right, shrunk.T, mean_y - (mean_x @ right.T) @ shrunk)


def _cross_validated(energy: Matrix, projected: Matrix, total: float, count: float) -> float:
    """The penalty of RIDGES with the least GCV score: residual / (rows - effective parameters)^2."""
    power = (projected**2).sum(axis=1)
    best, lowest = float(RIDGES[-1]), np.inf
    for ridge in RIDGES:
        kept = energy / (energy + ridge)
        freedom = max(count - 1.0, 1e-9)
        if float(kept.sum()) > MAX_FREEDOM_SHARE * freedom:
            continue
        residual = total - float(((2.0 - kept) * kept * power).sum())
        score = residual / (freedom - float(kept.sum())) ** 2
        if score < lowest:
            best, lowest = float(ridge), score
    return best
