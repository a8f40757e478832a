"""Progress on stderr: a rich bar on a terminal, one plain line an event otherwise.

A run reports dict events (the lines of metrics.jsonl, see federation/events.py). Read here:
    {"event": "phase", "name": text}                   something that has no rounds begins
    {"event": "resume", "round": last finished round}  a run is taken up
    {"event": "profile", "start_layer": layer}         the start layer is known
    {"event": "round", "round": 0-based, "rounds": n, "window": [first, stop], "loss": number or null}
    {"event": "eval", "accuracy" or "token_loss": number}
    {"event": "memory", "peak_rss_bytes": bytes, ...}
Keys beyond these are not read and unknown events are passed over: the file holds more than the eye needs.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from chainfed_engine.memory.meter import rss_bytes
from chainfed_engine.sizes import format_size


class RunProgress:
    """Called with each event of a run. `stream`: where to write (stderr); a bar only if that is a terminal."""

    def __init__(self, budget_bytes: int | None = None, stream: IO[str] | None = None) -> None:
        self._budget_bytes = budget_bytes
        self._stream = stream if stream is not None else sys.stderr
        self._last: dict[str, Mapping[str, Any]] = {}
        self._bar: Progress | None = None
        if self._stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(file=self._stream), transient=False)
        self._task: Any = None
        self._task_name = ""

    def __enter__(self) -> "RunProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        kind = str(event.get("event"))
        before, self._last[kind] = self._last.get(kind, {}), event
        if kind == "phase":
            self._begin(str(event["name"]), None)
        elif kind == "resume":
            self._line(f"resumed after round {int(event['round']) + 1}")
        elif kind == "profile" and event.get("start_layer") not in (None, before.get("start_layer")):
            self._line(f"start layer {event['start_layer']}")
        elif kind == "round":
            self._round(event)
        elif kind == "eval":
            self._line(f"eval  {_scores(event)}")

    def summary(self) -> str:
        """The last scores and the peak, for the line after the run."""
        parts = [_scores(self._last["eval"])] if "eval" in self._last else []
        peak = self._last.get("memory", {}).get("peak_rss_bytes")
        if peak is not None:
            parts.append(f"peak {self._of_budget(int(peak))}")
        return ", ".join(parts) or "done"

    def _round(self, event: Mapping[str, Any]) -> None:
        number, rounds = int(event["round"]) + 1, int(event["rounds"])
        text = _round_text(event)
        if self._bar is None:
            self._line(f"round {number}/{rounds}  {text}  {self._of_budget(rss_bytes())}")
            return
        if self._task_name != "rounds":
            self._begin("rounds", rounds)
        self._bar.update(self._task, completed=number, description=f"{text}  {self._of_budget(rss_bytes())}")

    def _begin(self, name: str, total: int | None) -> None:
        if self._bar is None:
            self._line(name)
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task, self._task_name = self._bar.add_task(name, total=total), name

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def _of_budget(self, num_bytes: int) -> str:
        budget = f" of {format_size(self._budget_bytes)}" if self._budget_bytes is not None else ""
        return f"{format_size(num_bytes)}{budget}"


@contextmanager
def byte_progress(name: str, stream: IO[str] | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done_bytes, total_bytes) that draws a bar of bytes, or prints each tenth without a terminal."""
    stream = stream if stream is not None else sys.stderr
    if not stream.isatty():
        yield _PlainBytes(name, stream)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda what, done, total: bar.update(task, completed=done, total=total, description=f"{name} {what}")


class _PlainBytes:
    def __init__(self, name: str, stream: IO[str]) -> None:
        self._name, self._stream, self._tenths = name, stream, -1

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None:
        tenths = 10 * done_bytes // max(1, total_bytes)
        if tenths > self._tenths:
            self._tenths = tenths
            sizes = f"{format_size(done_bytes)} of {format_size(total_bytes)}"
            print(f"{self._name} {10 * tenths}%  {sizes}  {what}", file=self._stream, flush=True)


def _round_text(event: Mapping[str, Any]) -> str:
    parts = []
    if (window := event.get("window")) is not None:
        parts.append(f"layers {window[0]}-{window[1] - 1}" if window[1] > window[0] else "classifier")
    if (loss := event.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    return "  ".join(parts)


def _scores(event: Mapping[str, Any]) -> str:
    names = ("accuracy", "token_loss", "loss")
    return ", ".join(f"{name.replace('_', ' ')} {event[name]:.4f}" for name in names if event.get(name) is not None)
