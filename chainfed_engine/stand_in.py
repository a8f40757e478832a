"""The linear stand-in: an affine map from the hidden state at some depth to the final one, fitted in closed form.

With it the one final head makes sense at every depth: local loss = head(stand_in(h)). A client sends the least-squares
factor of its rows (`least_squares.py`); the server merges and solves. NumPy only. Source: our own.

Where nothing but a linear classifier follows the final hidden state, a classifier that is not trained below the top and
the stand-in are one affine map to C logits: that is all a client needs there, C x D numbers instead of D x D.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from chainfed_engine import least_squares
from chainfed_engine.errors import InconsistentUpdates
from chainfed_engine.types import Arrays, classifier_key, stand_in_key

Matrix = np.ndarray[Any, Any]
ENCODERS = ("bert", "roberta", "distilbert")  # no norm between the last layer and the head
BATCHES = 16  # of all clients together; a map of D x D numbers wants as many rows as it can get
_GROUP_BYTES = 32 << 20  # float32 statistics of one exchange
_ROW_BYTES = 64 << 20  # float32 rows of all clients together, for one depth
_LARGE_BYTES = 8 << 20  # of one array of a map
KEY_PREFIX = stand_in_key(0, "").split("0")[0]
_SQUARED_WIDTH_ROWS = 1 << 34  # rows times D squared: bounds the solution of wide models, two factors [rows, D]


def depths_at_once(hidden_size: int) -> int:
    """How many depths' statistics one exchange may carry: 6 for D = 576, one for D = 4096."""
    return int(max(1, _GROUP_BYTES // (4 * (2 * hidden_size + 1) ** 2)))


def rows_in_all(hidden_size: int) -> int:
    """How many rows all clients together may give for one depth: 14551 for D = 576, 1024 for D = 4096."""
    return max(1, min(_ROW_BYTES // (4 * (2 * hidden_size + 1)), _SQUARED_WIDTH_ROWS // hidden_size**2))


def large_depths(arrays: Mapping[str, Matrix]) -> set[int]:
    """Depths whose map is too large to be kept beside another's (D of about 1500 and more): server and clients hold one
    such map at a time, and it is fitted anew when its window comes round again."""
    return {int(key.split(".")[1]) for key, array in arrays.items() if is_large(key, array.nbytes)}


def is_large(key: str, num_bytes: int) -> bool:
    return key.startswith(KEY_PREFIX) and num_bytes >= _LARGE_BYTES


def is_map(key: str) -> bool:
    """Whether this parameter is a part of a map to the final hidden state, without the classifier."""
    return key.startswith(KEY_PREFIX) and not key.split(".")[2].startswith("logit_")


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


def is_linear_readout(architecture: str, parameters: Iterable[str]) -> bool:
    """Whether the classifier among these parameter names is one linear map of the pooled final hidden state."""
    names = set(parameters)
    return (
        architecture in ENCODERS
        and classifier_key("out_weight") in names
        and classifier_key("transform_weight") not in names
    )


def with_classifier(solved: Arrays, depth: int, out_weight: Matrix, out_bias: Matrix) -> Arrays:
    """Stand-in at `depth` and classifier [C, D], [C] as one map: `logit_weight` float32 [C, D], `logit_bias` [C]."""
    if stand_in_key(depth, "weight") in solved:
        weight = out_weight.astype(np.float64) @ solved[stand_in_key(depth, "weight")]
    else:
        thin = out_weight.astype(np.float64) @ solved[stand_in_key(depth, "out_weight")]
        weight = thin @ solved[stand_in_key(depth, "in_weight")]
    bias = out_weight.astype(np.float64) @ solved[stand_in_key(depth, "bias")] + out_bias
    return {
        stand_in_key(depth, "logit_weight"): np.ascontiguousarray(weight, dtype=np.float32),
        stand_in_key(depth, "logit_bias"): np.ascontiguousarray(bias, dtype=np.float32),
    }


def _solve_one(factor: Matrix, ridge: float | None) -> Arrays:
    width = (factor.shape[1] - 1) // 2
    fitted = least_squares.solve(factor, width, ridge=ridge)
    if 2 * len(fitted.in_weight) < width:
        return {"in_weight": fitted.in_weight, "out_weight": fitted.out_weight, "bias": fitted.bias}
    return {"weight": fitted.weight, "bias": fitted.bias}
