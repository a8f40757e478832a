"""Function-Oriented Adaptive Tuning: which layers need adapters at all.

Before training, linear CKA is taken between every layer's output and the model's initial input (the embedding
output) on one mini-batch. Layers that still look like their input do general work and are left alone; the chain
starts at the first layer whose score falls below a threshold. NumPy only: the server averages scores without torch.

    CKA(X, Y) = ||X'Y||_F^2 / (||X'X||_F ||Y'Y||_F),  columns centred        (ChainFed; Kornblith et al., 2019)
"""

from typing import Any

import numpy as np

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.types import TaskKind

Matrix = np.ndarray[Any, Any]


def linear_cka(x: Matrix, y: Matrix) -> float:
    """CKA of two feature matrices [tokens, features] of the same tokens, in float64; 1.0 means equal up to rotation.

    Uses the Gram form (tokens x tokens) when there are fewer tokens than features. Constant features give 0.0.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0] or x.shape[0] < 2:
        raise InvalidArgument(
            f"linear_cka: expected two [tokens >= 2, features] of equal tokens, got {x.shape}, {y.shape}"
        )
    x = _centred(x)
    y = _centred(y)  # by now nothing here holds the x that came in
    if x.shape[0] <= max(x.shape[1], y.shape[1]):
        gram_x, gram_y = x @ x.T, y @ y.T
        cross = float(np.vdot(gram_x, gram_y))
        norms = float(np.linalg.norm(gram_x) * np.linalg.norm(gram_y))
    else:
        cross = float(np.linalg.norm(x.T @ y) ** 2)
        norms = float(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    return cross / norms if norms > 0.0 else 0.0


def _centred(features: Matrix) -> Matrix:
    """In float64, in place: a difference would hold two such matrices."""
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features.astype(np.float64)
    centred -= mean
    return centred


def is_wide(task: TaskKind, num_layers: int, window: int) -> bool:
    """Whether a classifier's window holds more than half of the layers."""
    return task == "classification" and 2 * window > num_layers


def start_layers(task: TaskKind, num_layers: int, window: int) -> range:
    """The layers that "auto" may choose from; where it is one, nobody need be asked for scores.

    Causal LM: no lower than one window below the topmost, nor than half of the layers unless the window itself is
    wider: a linear stand-in says little about the head's loss far below the top. On SmolLM2-135M (30 layers) the
    direction it gives an adapter has a cosine of 0.04 to the true one at depth 12, 0.17 at 20, 0.38 at 26.
    Classification: layer 0 where the window is wide: what is left to skip saves little then,
    and a wide window that slides over all layers ends 1.2 points above one that stays at the top (docs/LOG.md).
    """
    highest = num_layers - window
    if task == "causal-lm":
        return range(num_layers - max(window, min(2 * window, (num_layers + 1) // 2)), highest + 1)
    return range(1 if is_wide(task, num_layers, window) else highest + 1)


def choose_start_layer(scores: Matrix, *, threshold: float, allowed: range) -> int:
    """First layer (0-based) whose CKA score lies below `threshold`, no lower and no higher than `allowed`.

    `scores`: [num_layers], already averaged over clients weighted by samples. Threshold 1.0 starts at the lowest
    layer unless a layer reproduces its input exactly.
    """
    if not np.isfinite(scores).all() or not 0 <= allowed.start < allowed.stop <= len(scores):
        raise InvalidArgument(
            f"choose_start_layer: expected finite scores of every layer allowed, got {scores}, {allowed}"
        )
    below = np.flatnonzero(scores < threshold)
    first = int(below[0]) if len(below) else len(scores)
    return max(allowed.start, min(first, allowed.stop - 1))
