"""Progress on stderr: a bar with time left and memory on a terminal, one plain line an event otherwise.

Read here, of the events of a run (federation/events.py):
    {"event": "phase", "name": text, "total": n or null}           something long begins; "train" is a round
    {"event": "step", "done": n, "total": n}                       a client of it has answered
    {"event": "plan", "budget": bytes or null}                     the budget, if the caller did not name one
    {"event": "resume", "round": last finished round}              a run is taken up
    {"event": "profile", "start_layer": layer}                     the start layer is known
    {"event": "round", "round": 0-based, "rounds": n, "window": [first, stop], "loss": number or null}
    {"event": "eval", "accuracy" or "token_loss": number}
    {"event": "memory", "peak_rss_bytes": bytes}
    {"event": "end"}                                               the run is over
Keys beyond these are not read and unknown events are passed over: the file holds more than the eye needs.
"""

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from chainfed_engine.memory.meter import rss_bytes
from chainfed_engine.sizes import format_size

_NEAR = 0.95  # of the budget, from where memory is shown as close to it


class Progress:
    """Give it to `callbacks=`, or call it with each event. `budget_bytes`: by default the plan's; `stream`: stderr."""

    def __init__(self, budget_bytes: int | None = None, stream: IO[str] | None = None) -> None:
        self.budget_bytes = budget_bytes
        self._stream = stream if stream is not None else sys.stderr
        self._last: dict[str, Mapping[str, Any]] = {}
        self._bar: Bar | None = None
        self._task: Any = None
        self._task_name = ""
        self._clock = _Clock()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def on_event(self, event: Mapping[str, Any]) -> None:
        kind = str(event.get("event"))
        before, self._last[kind] = self._last.get(kind, {}), event
        if kind == "phase":
            self._phase(event)
        elif kind == "step":
            self._step(int(event.get("done", 0)), int(event.get("total", 0)))
        elif kind == "plan" and self.budget_bytes is None:
            self.budget_bytes = event.get("budget")
        elif kind == "resume":
            self._line(f"resumed after round {int(event['round']) + 1}")
        elif kind == "profile" and event.get("start_layer") not in (None, before.get("start_layer")):
            self._line(f"start layer {event['start_layer']}")
        elif kind == "round":
            self._round(event)
        elif kind == "eval":
            self._line(f"eval  {_scores(event)}")
        elif kind == "end":
            if self._task_name == "rounds" and event.get("error") is None:
                self._update(what="done")
            self._stop()

    __call__ = on_event

    def summary(self) -> str:
        """The last scores and the peak, for the line after the run."""
        parts = [_scores(self._last["eval"])] if "eval" in self._last else []
        memory = self._last.get("memory", {})
        peak = memory.get("budget_peak_bytes", memory.get("peak_rss_bytes"))
        if peak is not None:
            parts.append(f"peak {self._of_budget(int(peak))}")
        return ", ".join(parts) or "done"

    # -- what happens --------------------------------------------------------------------------------------------

    def _phase(self, event: Mapping[str, Any]) -> None:
        name, number, rounds = str(event["name"]), event.get("round"), event.get("rounds")
        if name == "train" and number is not None and rounds:
            self._clock.begin(int(number))
            self._begin("rounds", int(rounds))
            self._update(
                completed=int(number), what=_window_text(event), left=self._clock.left(int(number), int(rounds))
            )
        elif self._task_name == "rounds" and self._bar is not None:
            self._update(what=name)  # evaluation between rounds: the bar of the rounds stays
        elif name != "train":
            self._begin(name, event.get("total"))

    def _step(self, done: int, total: int) -> None:
        phase = self._last.get("phase", {})
        if phase.get("name") == "train" and phase.get("rounds") and total:
            at = int(phase["round"]) + done / total
            left = self._clock.left(at, int(phase["rounds"]))
            self._update(completed=at, what=f"{_window_text(phase)}  client {done}/{total}", left=left)
        elif phase.get("total"):
            self._update(completed=done)

    def _round(self, event: Mapping[str, Any]) -> None:
        number, rounds = int(event["round"]) + 1, int(event["rounds"])
        loss = f"loss {event['loss']:.4f}" if event.get("loss") is not None else ""
        left = self._clock.left(number, rounds)
        if not self._stream.isatty():
            parts = [_window_text(event), loss, self._of_budget(rss_bytes()), left]
            self._line(f"round {number}/{rounds}  " + "  ".join(part for part in parts if part))
            return
        self._begin("rounds", rounds)
        self._update(completed=number, what=_window_text(event), loss=loss, left=left)

    # -- how it is shown -----------------------------------------------------------------------------------------

    def _begin(self, name: str, total: int | None) -> None:
        """Show a bar for `name`, in place of another's."""
        if name == self._task_name:
            return
        self._task_name = name
        if not self._stream.isatty():
            if name != "rounds":
                self._line(name)
            return
        if self._bar is None:
            self._bar = Bar(
                SpinnerColumn(),
                BarColumn(bar_width=10, table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[count]}"),
                TextColumn("{task.fields[loss]}"),
                TextColumn("{task.fields[left]}", style="cyan"),
                _MemoryColumn(self),
                _WhatColumn(),
                console=Console(file=self._stream),
            )
            self._bar.start()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=total, count="", loss="", left="")

    def _update(self, *, completed: float | None = None, what: str | None = None, **fields: Any) -> None:
        if self._bar is None or self._task is None:
            return
        task = next(each for each in self._bar.tasks if each.id == self._task)
        if completed is not None and task.total:
            fields["count"] = f"{int(completed)}/{int(task.total)}"
        self._bar.update(self._task, completed=completed, description=what, refresh=True, **fields)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._task, self._task_name = None, None, ""

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def _of_budget(self, num_bytes: int) -> str:
        budget = f" of {format_size(self.budget_bytes)}" if self.budget_bytes is not None else ""
        return f"{format_size(num_bytes)}{budget}"


class _WhatColumn(ProgressColumn):
    """What is being done, last: it alone changes its length, and is cut where the terminal is narrow."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=False))  # the table takes room from no other

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class _MemoryColumn(ProgressColumn):
    """Resident memory now against the budget: yellow near it, red above."""

    max_refresh = 0.5  # seconds

    def __init__(self, progress: Progress) -> None:
        super().__init__(Column(no_wrap=True))
        self._progress = progress

    def render(self, task: Task) -> Text:
        used, budget = rss_bytes(), self._progress.budget_bytes
        style = "green" if budget is None or used < _NEAR * budget else "yellow" if used <= budget else "bold red"
        now, most = format_size(used), format_size(budget) if budget else ""
        if most and now.split()[-1] == most.split()[-1]:
            now = now.split()[0]
        return Text(f"{now}/{most}" if most else now, style=style)


class _Clock:
    """Time left, from what the rounds took since the first one seen here: a resumed run starts its own count."""

    def __init__(self) -> None:
        self._started: tuple[float, float] | None = None  # (seconds, rounds done then)

    def begin(self, rounds_done: float) -> None:
        if self._started is None:
            self._started = (time.monotonic(), rounds_done)

    def left(self, rounds_done: float, rounds: int) -> str:
        """As "h:mm:ss left"; empty while nothing can be said, and when all is done."""
        if self._started is None:
            self.begin(rounds_done)
            return ""
        seconds, done_then = self._started
        progress = rounds_done - done_then
        if progress <= 0 or rounds_done >= rounds:
            return ""
        passed = time.monotonic() - seconds
        return f"{timedelta(seconds=round(passed / progress * (rounds - rounds_done)))} left"


def _window_text(event: Mapping[str, Any]) -> str:
    window = event.get("window")
    if window is None:
        return ""
    return f"layers {window[0]}-{window[1] - 1}" if window[1] > window[0] else "classifier"


def _scores(event: Mapping[str, Any]) -> str:
    names = {"accuracy": "accuracy", "macro_f1": "macro F1", "token_loss": "token loss", "loss": "loss"}
    return ", ".join(f"{word} {event[name]:.4f}" for name, word in names.items() if event.get(name) is not None)
