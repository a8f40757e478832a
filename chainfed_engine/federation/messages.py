"""Tasks and replies as plain records: JSON-able dicts beside their arrays, the same for journal and network.

In: a `Task` or `Reply`; out: its record, and back. What comes back is untrusted: every type, size and range is checked
before a field is used, and the error says what was expected. Arrays travel apart from the record and are checked by
whoever reads them (files.py, codec.py).
"""

import math
from collections.abc import Mapping
from typing import Any

from chainfed_engine.errors import CorruptFile
from chainfed_engine.types import Arrays, Reply, Stage, Task, Window

_KINDS = ("profile", "train", "evaluate")
_MAX_TEXT, _MAX_ENTRIES, _MAX_LAYER = 4096, 1 << 16, 1 << 20


def task_record(task: Task) -> dict[str, Any]:
    return {
        "kind": task.kind,
        "client": task.client,
        "round_id": task.round_id,
        "stage": _stage_record(task.stage),
        "settings": dict(task.settings),
        "versions": dict(task.versions),
        "base": task.base,
    }


def task_from(record: object, arrays: Arrays) -> Task:
    """Raises CorruptFile naming the field."""
    fields = _fields(record, "task", {"kind", "client", "round_id", "stage", "settings", "versions", "base"})
    return Task(
        _kind(fields),
        _text(fields, "client"),
        _whole(fields["round_id"], "round_id", 2**53),
        _stage(fields["stage"]),
        arrays,
        _mapping(fields, "settings", (int, float, str, bool)),
        _mapping(fields, "versions", (str,)),
        _text(fields, "base"),
    )


def reply_record(reply: Reply) -> dict[str, Any]:
    return {
        "kind": reply.kind,
        "client": reply.client,
        "round_id": reply.round_id,
        "num_samples": reply.num_samples,
        "metrics": dict(reply.metrics),
        "error": reply.error,
        "stage": _stage_record(reply.stage),
        "base": reply.base,
    }


def reply_from(record: object, arrays: Arrays) -> Reply:
    """Raises CorruptFile naming the field."""
    names = {"kind", "client", "round_id", "num_samples", "metrics", "error", "stage", "base"}
    fields = _fields(record, "reply", names)
    error = None if fields["error"] is None else _text(fields, "error")
    return Reply(
        _kind(fields),
        _text(fields, "client"),
        _whole(fields["round_id"], "round_id", 2**53),
        _whole(fields["num_samples"], "num_samples", 2**53),
        arrays,
        _mapping(fields, "metrics", (int, float)),
        error,
        _stage(fields["stage"]),
        _text(fields, "base"),
    )


def _stage_record(stage: Stage | None) -> dict[str, Any] | None:
    if stage is None:
        return None
    window = stage.window
    picked = None if window.picked is None else list(window.picked)
    return {"kind": stage.kind, "start": window.start, "stop": window.stop, "picked": picked, "sweep": stage.sweep}


def _stage(record: object) -> Stage | None:
    if record is None:
        return None
    fields = _fields(record, "stage", {"kind", "start", "stop", "picked", "sweep"})
    kind = fields["kind"]
    if kind not in ("probe", "window"):
        raise CorruptFile(f"message: expected a stage of kind probe or window, got {kind!r:.60}")
    start, stop = (_whole(fields[name], f"stage {name}", _MAX_LAYER) for name in ("start", "stop"))
    if start > stop:
        raise CorruptFile(f"message: expected a window from below to above, got {start} to {stop}")
    return Stage(
        kind, Window(start, stop, _picked(fields["picked"], start, stop)), _whole(fields["sweep"], "stage sweep", 2**53)
    )


def _picked(layers: object, start: int, stop: int) -> tuple[int, ...] | None:
    if layers is None:
        return None
    if not isinstance(layers, list) or not all(type(layer) is int and start <= layer < stop for layer in layers):
        raise CorruptFile(f"message: stage picked: expected layers {start} to {stop - 1}, got {layers!r:.100}")
    if layers != sorted(set(layers)):
        raise CorruptFile(f"message: stage picked: expected layers in ascending order, each once, got {layers!r:.100}")
    return tuple(layers)


def _fields(record: object, what: str, names: set[str]) -> Mapping[str, Any]:
    if not isinstance(record, Mapping) or set(record) != names:
        raise CorruptFile(f"message: expected a {what} with {sorted(names)}, got {record!r:.100}")
    return record


def _kind(fields: Mapping[str, Any]) -> Any:
    if fields["kind"] not in _KINDS:
        raise CorruptFile(f"message: expected a kind of {', '.join(_KINDS)}, got {fields['kind']!r:.60}")
    return fields["kind"]


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise CorruptFile(f"message: {name}: expected text of at most {_MAX_TEXT} characters, got {value!r:.60}")
    return value


def _whole(value: object, name: str, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise CorruptFile(f"message: {name}: expected a whole number from 0 below {limit}, got {value!r:.60}")
    return value


def _mapping(fields: Mapping[str, Any], name: str, kinds: tuple[type, ...]) -> dict[str, Any]:
    value = fields[name]
    if not isinstance(value, Mapping) or len(value) > _MAX_ENTRIES:
        raise CorruptFile(f"message: {name}: expected a mapping of at most {_MAX_ENTRIES} entries")
    for key, entry in value.items():
        if not isinstance(key, str) or len(key) > _MAX_TEXT or type(entry) not in kinds:
            raise CorruptFile(f"message: {name}: expected names with {_names(kinds)}, got {key!r:.60}: {entry!r:.60}")
        if isinstance(entry, str) and len(entry) > _MAX_TEXT:
            raise CorruptFile(f"message: {name}: expected texts of at most {_MAX_TEXT} characters at {key!r:.60}")
        if isinstance(entry, int) and abs(entry) >= 2**63:  # JSON's are of any length, and no float holds them
            raise CorruptFile(f"message: {name}: expected a number of 64 bits at {key!r:.60}")
        if isinstance(entry, float) and not math.isfinite(entry):
            raise CorruptFile(f"message: {name}: expected a finite number at {key!r:.60}, got {entry}")
    return dict(value)


def _names(kinds: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)
