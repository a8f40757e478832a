"""What a reply must be before it may count. In: one reply of unknown quality; out: None, or the reason to refuse it.

A reply comes from the network: names, types, shapes and numbers are checked before anything is computed from them.
A reason is one line and starts with `NON_FINITE` when numbers overflowed, so that a stop can name the right cause.
"""

import math
import numbers
import re
from collections.abc import Mapping

import numpy as np

from chainfed_engine.types import Arrays, Reply, Stage, Task

NON_FINITE = "not finite"
MAX_REASON_CHARS = 300
_MAX_METRICS = 64
_MAX_METRIC = 1e15
_METRIC_NAME = re.compile(r"[a-z0-9_]{1,64}")


def one_line(text: object) -> str:
    """`text` without line breaks and of bounded length: it goes into logs and error messages."""
    return " ".join(str(text).split())[:MAX_REASON_CHARS]


def is_late(reply: Reply, *, round_id: int, profile_attempts: int) -> bool:
    """Whether this answers a task of an earlier exchange: with so many rounds and profile attempts behind us."""
    behind = {"train": round_id, "profile": profile_attempts}.get(str(reply.kind), 0)
    return _is_integer(reply.round_id) and 0 <= reply.round_id < behind


def refuse_envelope(reply: Reply, task: Task, *, max_samples: int) -> str | None:
    """Everything but the arrays: error, kind, round, frozen model, window, weight, metrics."""
    if reply.error is not None:
        return one_line(f"client error: {reply.error}")
    if reply.kind != task.kind:
        return one_line(f"expected a reply to {task.kind}, got {reply.kind}")
    if not _is_integer(reply.round_id) or reply.round_id != task.round_id:
        return one_line(f"expected round {task.round_id}, got {reply.round_id}")
    if reply.base != task.base:
        return one_line(f"expected an update of the frozen model {task.base[:12]!r}, got one of {reply.base!s:.12}")
    if reply.stage != task.stage:
        return one_line(f"expected the window {_window(task.stage)}, got {_window(reply.stage)}")
    if not _is_integer(reply.num_samples) or not 1 <= reply.num_samples <= max_samples:
        return one_line(
            f"num_samples: expected 1 to {max_samples} (what the client announced), got {reply.num_samples}"
        )
    return _refuse_metrics(reply.metrics)


def refuse_arrays(arrays: Arrays, expected: Mapping[str, np.ndarray]) -> str | None:
    """Keys, shapes and dtypes must be those of `expected`, every value finite."""
    if not isinstance(arrays, Mapping):
        return f"expected a mapping of arrays, got {type(arrays).__name__}"
    if arrays.keys() != expected.keys():
        missing = sorted(expected.keys() - arrays.keys())
        surplus = sorted(map(str, arrays.keys() - expected.keys()))
        return one_line(f"parameters differ from the stage's: missing {missing[:3]}, not asked for {surplus[:3]}")
    for key, like in expected.items():
        reason = refuse_array(key, arrays[key], shape=like.shape, dtype=like.dtype)
        if reason is not None:
            return reason
    return None


def refuse_array(key: str, array: object, *, shape: tuple[int, ...], dtype: object) -> str | None:
    """One array against its exact shape and dtype, every value finite."""
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        return one_line(f"{key}: expected {np.dtype(dtype)} {list(shape)}, got {got}")  # type: ignore[call-overload]
    if not np.isfinite(array).all():
        return f"{NON_FINITE}: {key} holds NaN or infinity"
    return None


def _refuse_metrics(metrics: object) -> str | None:
    if not isinstance(metrics, Mapping) or len(metrics) > _MAX_METRICS:
        return f"metrics: expected a mapping of at most {_MAX_METRICS} numbers"
    for name, value in metrics.items():
        if not isinstance(name, str) or not _METRIC_NAME.fullmatch(name):
            return "metrics: expected names of at most 64 small letters, digits and underscores"
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return one_line(f"metric {name}: expected a number, got {type(value).__name__}")
        try:
            number = float(value)
        except OverflowError:
            return one_line(f"metric {name}: expected at most {_MAX_METRIC:g}, got a whole number beyond float64")
        if not math.isfinite(number):
            return one_line(f"{NON_FINITE}: metric {name} is {value}")
        if abs(number) > _MAX_METRIC:  # sums over all clients must stay finite
            return one_line(f"metric {name}: expected at most {_MAX_METRIC:g}, got {value}")
    return None


def _window(stage: object) -> str:
    return f"{stage.window.start} to {stage.window.stop}" if isinstance(stage, Stage) else "none"


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
