"""Affine least squares from rows that lie on many sites: a factor a site, merged by stacking, solved in one place.

A site sends what least squares needs and nothing else: the triangular factor R of [X | 1 | Y] = QR, whose R'R are the
usual sums X'X, X'Y, Y'Y. It has no more rows than the site has samples, so a small site sends a rotation of its own
rows: such statistics are no protection of the features. NumPy only, so that the server can solve without torch.

The penalty is chosen by generalised cross-validation over the rows themselves, which the factor allows exactly.
Source: ordinary ridge regression; Golub, Heath and Wahba 1979 for the penalty.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Matrix = np.ndarray[Any, Any]
RIDGES = tuple(10.0**exponent for exponent in np.arange(-4.0, 1.51, 0.25))  # tried by cross-validation
# With effective parameters close to the number of rows the cross-validation score is 0/0 and picks interpolation.
MAX_FREEDOM_SHARE = 0.7
BLOCK_COLUMNS = 128  # centred at a time


def factor(x: Matrix, y: Matrix) -> Matrix:
    """[min(n, W), W] of rows x [n, Dx] -> y [n, Dy], W = Dx + 1 + Dy: the rows as they are where they are no more than
    W, else as many with the same sums of squares and products, in float64."""
    width = x.shape[1] + 1 + y.shape[1]

    def joined(rows: slice) -> Matrix:
        return np.concatenate([x[rows], np.ones((len(x[rows]), 1), x.dtype), y[rows]], axis=1)

    if len(x) <= width:
        return joined(slice(None))
    step = rows_at_once(width)
    return _reduced((joined(slice(begin, begin + step)) for begin in range(0, len(x), step)), width)


def gathered(pieces: Iterable[tuple[Matrix, Matrix]]) -> Matrix:
    """`factor`, bit for bit, of rows that come in pieces (x, y): however many there are, no more than W and a half of
    them are held."""
    blocks, kept, count, width = _regrouped(pieces), [], 0, 0
    for block in blocks:
        kept.append(block)
        count, width = count + len(block), block.shape[1]
        if count > width:
            return _reduced(_emptied(kept, blocks), width)
    return np.concatenate(kept)


def _regrouped(pieces: Iterable[tuple[Matrix, Matrix]]) -> Iterator[Matrix]:
    """The joined rows in blocks of as many as a reduction takes in at a time."""
    block, filled = np.empty((0, 0)), 0
    for x, y in pieces:
        rows = np.concatenate([x, np.ones((len(x), 1), x.dtype), y], axis=1)
        while len(rows):
            if filled == len(block):
                block, filled = np.empty((rows_at_once(rows.shape[1]), rows.shape[1]), rows.dtype), 0
            taken = rows[: len(block) - filled]
            block[filled : filled + len(taken)] = taken
            filled, rows = filled + len(taken), rows[len(taken) :]
            if filled == len(block):
                yield block
    if filled < len(block):
        yield block[:filled]


def _emptied(kept: list[Matrix], more: Iterator[Matrix]) -> Iterator[Matrix]:
    """What is kept, let go one by one, and what is still to come."""
    while kept:
        yield kept.pop(0)
    yield from more


def merge(factors: Sequence[Matrix], scales: Sequence[float] | None = None) -> Matrix:
    """One factor of the rows of all, those of `factors[i]` times `scales[i]` (None: as they are); of equal width, in
    the order given (which fixes the bits). float16 is widened a piece at a time: never all of them twice."""
    scales = [1.0] * len(factors) if scales is None else scales
    if len(factors) == 1:
        return _scaled(factors[0], scales[0])
    width = factors[0].shape[1]
    pairs = zip(factors, scales, strict=True)
    if sum(map(len, factors)) > width:
        return _reduced((_scaled(part, scale) for one, scale in pairs for part in _pieces(one, width)), width)
    merged, filled = np.empty((sum(map(len, factors)), width), np.result_type(np.float32, *factors)), 0
    for one, scale in pairs:
        merged[filled : filled + len(one)] = _scaled(one, scale)
        filled += len(one)
    return merged


def _scaled(rows: Matrix, scale: float) -> Matrix:
    rows = rows.astype(np.float32) if rows.dtype == np.float16 else rows
    return rows if scale == 1.0 else rows * rows.dtype.type(scale)


def rows_at_once(width: int) -> int:
    """Rows that a reduction takes in at a time, beside the factor so far."""
    return -(-width // 2)


def _pieces(rows: Matrix, width: int) -> Iterator[Matrix]:
    step = rows_at_once(width)
    return (rows[begin : begin + step] for begin in range(0, len(rows), step))


def _reduced(blocks: Iterable[Matrix], width: int) -> Matrix:
    """Triangular factor [width, width], float64, of blocks of rows taken in one after another."""
    held = np.empty((0, width))
    for block in blocks:
        held = np.concatenate([held, block.astype(np.float64, copy=False)])
        if len(held) > width:
            held = np.asarray(np.linalg.qr(held, mode="r"))
    return held


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


def solve(merged: Matrix, x_width: int, *, ridge: float | None = None, through: Matrix | None = None) -> Affine:
    """The ridge solution for a factor whose first `x_width` columns are x. `ridge` is relative to the mean squared
    column of x; None chooses it by generalised cross-validation. `through`: the point [Dx + Dy] that the map passes
    through; None: the rows' mean, which is where the best one does.

    By the eigenvectors of X X' (fewer rows than columns) or X' X, centred a block of columns at a time, in float64:
    beside the factor, which is only read, memory is that of the result and three matrices of the smaller side.
    """
    centred = _Centred(merged, x_width, through)
    wide = len(merged) < x_width
    energy, vectors = np.linalg.eigh(centred.outer() if wide else centred.inner())
    kept = energy > max(float(energy[-1]), 0.0) * len(energy) * np.finfo(np.float64).eps
    energy, vectors = energy[kept], vectors[:, kept]
    sizes = np.sqrt(energy)
    scale = max(float(energy.sum()) / x_width, 1e-12)
    # left [n, r], right [r, Dx] and sizes are the singular value decomposition of x; projected = left' y.
    if wide:
        right = centred.times(vectors.T, centred.x) / sizes[:, None]
        projected = centred.times(vectors.T, centred.y)
    else:
        right = vectors.T
        projected = np.empty((len(energy), centred.y.stop - centred.y.start))
        for columns, block in centred.blocks(centred.y):
            moments = centred.times(block.T, centred.x)  # [block, Dx]
            projected[:, columns.start - centred.y.start : columns.stop - centred.y.start] = right @ moments.T
        projected /= sizes[:, None]
    if ridge is None:
        ridge = _cross_validated(energy / scale, projected, centred.power(centred.y), centred.count)
    projected *= (sizes / (energy + ridge * scale))[:, None]  # [r, Dy]
    mean_x, mean_y = centred.mean[centred.x], centred.mean[centred.y]
    return Affine(right, projected.T, mean_y - (mean_x @ right.T) @ projected)


class _Centred:
    """Columns of a factor [n, W] with their mean, or a given `point`, taken out, as float64, a block at a time."""

    def __init__(self, factor: Matrix, x_width: int, point: Matrix | None) -> None:
        self._factor = factor
        # A rotation of the column of ones: centring works in any rotation.
        self._ones = factor[:, x_width].astype(np.float64)
        self.count = float((self._ones**2).sum())
        self.x, self.y = slice(0, x_width), slice(x_width + 1, factor.shape[1])
        if point is not None:
            self.mean = np.insert(point.astype(np.float64), x_width, 1.0)
            return
        self.mean = np.concatenate([self._ones @ block for _, block in self._raw(slice(0, factor.shape[1]))])
        self.mean /= self.count

    def blocks(self, columns: slice) -> Iterator[tuple[slice, Matrix]]:
        for part, block in self._raw(columns):
            block -= np.outer(self._ones, self.mean[part])
            yield part, block

    def outer(self) -> Matrix:
        """X X' [n, n]."""
        total = np.zeros((len(self._factor), len(self._factor)))
        for _, block in self.blocks(self.x):
            total += block @ block.T
        return total

    def inner(self) -> Matrix:
        """X' X [Dx, Dx]."""
        return np.concatenate([self.times(block.T, self.x) for _, block in self.blocks(self.x)])

    def times(self, left: Matrix, columns: slice) -> Matrix:
        """left [m, n] times these columns: [m, number of columns]."""
        return np.concatenate([left @ block for _, block in self.blocks(columns)], axis=1)

    def power(self, columns: slice) -> float:
        return sum(float((block**2).sum()) for _, block in self.blocks(columns))

    def _raw(self, columns: slice) -> Iterator[tuple[slice, Matrix]]:
        for begin in range(columns.start, columns.stop, BLOCK_COLUMNS):
            part = slice(begin, min(begin + BLOCK_COLUMNS, columns.stop))
            yield part, self._factor[:, part].astype(np.float64)


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
