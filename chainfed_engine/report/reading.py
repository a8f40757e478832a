"""A run directory as the report needs it. In: metrics.jsonl and config.toml of a run in any state; out: `RunLog`.

Bytes from disk are hostile: a line that is no event, a number that is none, a name that is too long is left out or cut,
never an error, and `notes` says how many. An unfinished run, a run cut off inside a line, one without evaluation and
one without a start layer are all ordinary. Only a missing file is an error.
"""

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from chainfed_engine.errors import StorageError

MAX_LINE_BYTES = 8 << 20
MAX_NAME_CHARS = 120
MAX_TEXT_CHARS = 400
MAX_ROUND = 2**31 - 1
MAX_LAYER = 1023
_MAX_PARTS = 12
_MAX_NUMBER = 1e30
_T = TypeVar("_T")


@dataclass(frozen=True)
class Round:
    """One exchange. `window`: first layer and the one after the last, None in a probe."""

    index: int
    accepted: bool
    loss: float | None
    window: tuple[int, int] | None
    clients: tuple[str, ...]
    rejected: Mapping[str, str]  # client -> reason
    silent: tuple[str, ...]  # asked, but no answer came in time
    bytes_down: float
    bytes_up: float
    seconds: Mapping[str, float]


@dataclass
class RunLog:
    """What one run left. `plan`: predicted bytes by part; `measured`: peak bytes by round (-1: before the first)."""

    name: str
    rounds: dict[int, Round] = field(default_factory=dict)
    planned_rounds: int | None = None
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    measured: dict[int, float] = field(default_factory=dict)
    predicted_peak_bytes: float | None = None
    plan: dict[str, float] = field(default_factory=dict)
    budget_bytes: float | None = None
    cka: list[float] = field(default_factory=list)
    start_layer: int | None = None
    profile_bytes: float = 0.0
    profile_seconds: float = 0.0
    profile_rejected: dict[str, str] = field(default_factory=dict)
    config: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def bytes_sent(self) -> float:
        return self.profile_bytes + sum(each.bytes_down + each.bytes_up for each in self.rounds.values())

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by part over all rounds; the parts do not overlap (see `parts_of_round`)."""
        totals: dict[str, float] = {}
        for each in self.rounds.values():
            for name, value in parts_of_round(each).items():
                totals[name] = totals.get(name, 0.0) + value
        return {**totals, "profile": self.profile_seconds}

    @property
    def last_scores(self) -> dict[str, float]:
        return self.evaluations[max(self.evaluations)] if self.evaluations else {}

    @property
    def num_layers(self) -> int:
        """Layers of the model as far as the metrics show them."""
        windows = [each.window[1] for each in self.rounds.values() if each.window]
        return max([len(self.cka), *windows, (self.start_layer or 0) + 1])

    @property
    def is_finished(self) -> bool:
        return self.planned_rounds is not None and len(self.rounds) >= self.planned_rounds


def parts_of_round(each: Round) -> dict[str, float]:
    """`prepare` and `train` as clients measured them, `other`: the rest of the exchange, `server`.

    Clients that work at the same time measure more seconds than the exchange took: then nothing is left for `other`.
    """
    seconds = dict(each.seconds)
    exchange = seconds.pop("transport", 0.0)
    server = seconds.pop("server", 0.0)
    return {**seconds, "other": max(0.0, exchange - sum(seconds.values())), "server": server}


def read_run(path: str | Path, name: str | None = None) -> RunLog:
    """The run in folder `path`. Raises StorageError if it holds no metrics.jsonl."""
    path = Path(path)
    log = RunLog(_text(name or path.resolve().name, MAX_NAME_CHARS))
    skipped = 0
    try:
        for line in _lines(path / "metrics.jsonl"):
            event = _event(line)
            if event is None:
                skipped += 1
            else:
                _take(log, event)
    except OSError as error:
        raise StorageError(
            f"{path}: no metrics.jsonl that can be read ({error.strerror}); expected the directory of a run"
        ) from error
    if skipped:
        log.notes.append(
            f"{skipped} line(s) of metrics.jsonl could not be read: the run was cut off or the file damaged."
        )
    _read_config(log, path / "config.toml")
    return log


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of bounded length; the rest of a longer one is skipped and the line given as it was cut (no event)."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            cut = line
            while not cut.endswith(b"\n") and (cut := file.readline(MAX_LINE_BYTES)):
                pass
            if line.strip():
                yield line


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _take(log: RunLog, event: dict[str, Any]) -> None:
    kind = event["event"]
    rounds = _whole(event.get("rounds"), MAX_ROUND)
    log.planned_rounds = rounds or log.planned_rounds
    index = _whole(event.get("round"), MAX_ROUND, low=-1)
    if kind == "plan":
        log.plan = _numbers(event.get("parts"))
        log.budget_bytes = _number(event.get("budget"))
        log.predicted_peak_bytes = _number(event.get("predicted_peak_bytes"))
    elif kind == "profile":
        _take_profile(log, event)
    elif kind == "round" and index is not None and index >= 0:
        log.rounds[index] = _round(index, event)
        log.start_layer = _first(_whole(event.get("start_layer"), MAX_LAYER), log.start_layer)
    elif kind == "memory" and index is not None:
        if (peak := _number(event.get("budget_peak_bytes", event.get("peak_rss_bytes")))) is not None:
            log.measured[index] = max(peak, log.measured.get(index, 0.0))
        log.predicted_peak_bytes = _first(_number(event.get("predicted_peak_bytes")), log.predicted_peak_bytes)
    elif kind == "eval" and index is not None:
        scores = {name: _number(event.get(name)) for name in ("accuracy", "token_loss", "loss")}
        log.evaluations[index] = {name: value for name, value in scores.items() if value is not None}
    elif kind == "resume" and index is not None:
        log.notes.append(f"The run was taken up again after round {index + 1}.")


def _take_profile(log: RunLog, event: dict[str, Any]) -> None:
    scores = event.get("cka")
    found = [_number(score) for score in scores[: MAX_LAYER + 1]] if isinstance(scores, list) else []
    known = [score for score in found if score is not None]
    if known and len(known) == len(found):
        log.cka = known
    log.start_layer = _first(_whole(event.get("start_layer"), MAX_LAYER), log.start_layer)
    log.profile_bytes += _number(event.get("bytes_sent")) or 0.0
    log.profile_seconds += sum(_numbers(event.get("seconds")).values())
    log.profile_rejected |= _reasons(event.get("rejected"))


def _round(index: int, event: dict[str, Any]) -> Round:
    window = event.get("window")
    layers = [_whole(layer, MAX_LAYER + 1) for layer in window] if isinstance(window, list) else []
    first, stop = layers if len(layers) == 2 else (None, None)
    return Round(
        index,
        event.get("accepted") is not False,
        _number(event.get("loss")),
        (first, stop) if first is not None and stop is not None and first < stop else None,
        _names(event.get("clients")),
        _reasons(event.get("rejected")),
        _names(event.get("silent")),
        _number(event.get("bytes_down")) or 0.0,
        _number(event.get("bytes_up")) or 0.0,
        _numbers(event.get("seconds")),
    )


def _read_config(log: RunLog, path: Path) -> None:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        log.notes.append("config.toml could not be read.")
        return
    for table, values in document.items():
        if isinstance(values, dict):
            log.config[_text(table, MAX_NAME_CHARS)] = {
                _text(key, MAX_NAME_CHARS): _text(value, MAX_TEXT_CHARS) for key, value in values.items()
            }
    memory = document.get("memory")
    if log.budget_bytes is None and isinstance(memory, dict):
        log.budget_bytes = _number(memory.get("budget"))


def _number(value: object) -> float | None:
    """A finite number that is not negative, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_NUMBER:
        return None
    return float(value) if math.isfinite(value) else None


def _numbers(value: object) -> dict[str, float]:
    pairs = list(value.items())[:_MAX_PARTS] if isinstance(value, dict) else []
    named = {_text(name, MAX_NAME_CHARS): _number(each) for name, each in pairs}
    return {name: each for name, each in named.items() if each is not None}


def _whole(value: object, high: int, low: int = 0) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high else None


def _names(value: object) -> tuple[str, ...]:
    return tuple(_text(name, MAX_NAME_CHARS) for name in value) if isinstance(value, list) else ()


def _reasons(value: object) -> dict[str, str]:
    pairs = value.items() if isinstance(value, dict) else ()
    return {_text(name, MAX_NAME_CHARS): _text(reason, MAX_TEXT_CHARS) for name, reason in pairs}


def _text(value: object, max_chars: int) -> str:
    """Printable text on one line (escaping is the page's business)."""
    try:
        text = str(value)
    except ValueError:  # an integer of thousands of digits
        text = "?"
    shown = "".join(char if char.isprintable() else " " for char in text[: max_chars + 1])
    return shown if len(text) <= max_chars else shown[:max_chars] + "…"


def _first(value: _T | None, other: _T | None) -> _T | None:
    return other if value is None else value
