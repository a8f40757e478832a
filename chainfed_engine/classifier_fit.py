"""The classifier in closed form: ridge regression of the labels on the final features, exact however clients differ.

Every client sends the least-squares factor of its rows [features | 1 | one-hot label] (`least_squares.py`; it tells
the client's label counts, and of a small client the features themselves up to a rotation). The server merges and
solves; the answer is that of all rows in one place, whereas averaged local training of a linear layer is pulled to and
fro by skewed clients. Least squares fits probabilities; near equal ones a softmax's logits are `num_labels` times as
steep (dp = dz / C for centred logits), hence the factor. NumPy only.

Source: Fani et al., "Accelerating Heterogeneous Federated Learning with Closed-form Classifiers", 2024, for the idea.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from chainfed_engine import least_squares
from chainfed_engine.types import Arrays, classifier_key

Matrix = np.ndarray[Any, Any]
FACTOR_KEY = classifier_key("factor")
# Rows given after training count once and those given before it, of other features, half; kept as 2 and 1.
REFIT_WEIGHT = 2.0
MOST_CLIENTS = 64  # asked in one round
_EXPLAINED = 0.1  # of the loss of a classifier that knows nothing
_ROW_BYTES = 64 << 20  # float32 rows of all clients in all rounds together


def max_rows(hidden_size: int, num_labels: int, num_clients: int) -> int:
    """Rows that each of `num_clients` may give: of 80 clients 543 for D = 384 and C = 2, 52 for D = 4096."""
    return max(1, _ROW_BYTES // (4 * (hidden_size + 1 + num_labels)) // max(num_clients, 1))


def explains(loss: float, num_labels: int) -> bool:
    """Whether a classifier with this mean cross-entropy on training rows has nothing left that a refit could mend: what
    was trained through it separates them, and least squares on labels would only blur it (docs/LOG.md, 2026-11-29)."""
    return loss < _EXPLAINED * float(np.log(num_labels))


def refit_clients(asked: int, clients_per_round: int, rounds: int) -> int:
    """How many of the `asked` clients each of `rounds` refit rounds asks, or one more. They are sent all trained
    adapters, so every client is asked once, unless that left fewer a round than train in one."""
    spread = asked // max(rounds, 1)
    return spread if spread >= clients_per_round else asked


def statistics(features: Matrix, labels: Matrix, num_labels: int) -> Arrays:
    """Factor of features [n, D] and labels int64 [n] below `num_labels`: float32 [min(n, W), W], W = D + 1 + C."""
    return gathered([(features, labels)], num_labels)


def gathered(pieces: Iterable[tuple[Matrix, Matrix]], num_labels: int) -> Arrays:
    """`statistics`, bit for bit, of features and labels that come in pieces: they are not held together."""

    def one_hot(labels: Matrix, dtype: Any) -> Matrix:
        rows: Matrix = np.zeros((len(labels), num_labels), dtype)
        rows[np.arange(len(labels)), labels] = 1.0
        return rows

    factor = least_squares.gathered((features, one_hot(labels, features.dtype)) for features, labels in pieces)
    return {FACTOR_KEY: factor.astype(np.float32, copy=False)}


def merge(factors: list[Matrix], weights: Sequence[float] | None = None) -> Matrix:
    """The factor of the rows of all, each of `factors[i]` counted `weights[i]` times, float32, in the order given."""
    scales = None if weights is None else [float(np.sqrt(weight)) for weight in weights]
    return least_squares.merge(factors, scales).astype(np.float32, copy=False)


def weighted(factor: Matrix, weight: float) -> Matrix:
    """The factor of the same rows, each counted `weight` times."""
    return factor * np.float32(np.sqrt(weight))


def solve(factor: Matrix, num_labels: int, *, bias: bool = True) -> Arrays:
    """`classifier.out_weight` float32 [C, D] and, with `bias`, `classifier.out_bias` [C]."""
    width = factor.shape[1] - 1 - num_labels
    # Without a bias all classes are equally likely where the features are zero.
    through = None if bias else np.concatenate([np.zeros(width), np.full(num_labels, 1.0 / num_labels)])
    fitted = least_squares.solve(factor, width, through=through)
    steepness = float(num_labels)
    solved = {classifier_key("out_weight"): np.ascontiguousarray(steepness * fitted.weight, np.float32)}
    if bias:
        solved[classifier_key("out_bias")] = np.ascontiguousarray(steepness * fitted.bias, np.float32)
    return solved
