"""A whole run: take up or start, rounds, evaluation where it is due, result. In: the parts, built; out: `FitResult`.

A run that was killed and taken up again ends with the same bits and the same metrics (but for seconds and bytes: after
a restart the server no longer relies on what clients hold).
"""

import math
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from chainfed_engine.client import Client
from chainfed_engine.errors import ChainfedError
from chainfed_engine.federation.events import Event, belongs_to_past, evaluation_event
from chainfed_engine.federation.privacy import check_accountant
from chainfed_engine.federation.round import run_rounds
from chainfed_engine.federation.run_directory import RunDirectory
from chainfed_engine.federation.transport_local import Transport
from chainfed_engine.server import Server, Summary
from chainfed_engine.types import Arrays, Reply, Task


@dataclass(frozen=True)
class FitResult:
    """`parameters`: adapters and classifier, float32; `evaluation`: the last `eval` event's figures, NaN where one is
    not finite, {} without an evaluation."""

    parameters: Arrays
    start_layer: int | None
    rounds: int
    evaluation: Mapping[str, float]


def measure_peak_rss() -> dict[str, int]:
    """Peak resident set of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def fit(
    server: Server,
    transport: Transport,
    evaluator: Client | None,
    directory: RunDirectory,
    *,
    on_event: Callable[[Event], None] | None = None,
    resume: bool = False,
    measure_memory: Callable[[], Mapping[str, int]] = measure_peak_rss,
    held: Mapping[str, object] | None = None,
) -> FitResult:
    """Run `server` (fresh, of the run's own configuration) to its end.

    `evaluator` scores the whole model every `eval_every` rounds and at the end (None: never). `on_event` sees every
    line of metrics.jsonl as it is written, and `phase` (an exchange or an evaluation begins) and `step` events (one a
    reply) for a progress bar.
    `measure_memory`: the figures of a `memory` event. `held`: what clients say they kept of an earlier run.
    """
    if server.config.dp_noise:
        check_accountant(server.config)
        server.combiner.noise_key = directory.noise_key()
    return _Run(server, transport, evaluator, directory, on_event, measure_memory).run(resume, held or {})


class _Run:
    def __init__(
        self,
        server: Server,
        transport: Transport,
        evaluator: Client | None,
        directory: RunDirectory,
        on_event: Callable[[Event], None] | None,
        measure_memory: Callable[[], Mapping[str, int]],
    ) -> None:
        self._server = server
        self._transport = _Watched(transport, self._notify)
        self._evaluator = evaluator
        self._directory = directory
        self._on_event = on_event
        self._measure_memory = measure_memory
        self._evaluated: Event = {}

    def run(self, resume: bool, held: Mapping[str, object]) -> FitResult:
        if resume:
            self._take_up()
        for client, versions in held.items():
            self._server.believe(client, versions)
        run_rounds(
            self._server, self._transport, self._directory, emit=self._emit, after_exchange=self._after, held=held
        )
        setbacks = self._server.setbacks_at_end()
        if setbacks is not None:
            warnings.warn(setbacks, stacklevel=2)
        if not self._is_evaluated():
            self._evaluate()
        figures = {
            name: math.nan if value is None else value
            for name, value in self._evaluated.items()
            if name not in ("event", "round")
        }
        server = self._server
        return FitResult(server.parameters(), server.start_layer, server.round_id, figures)

    def _take_up(self) -> None:
        saved = self._directory.load()
        if saved is not None:
            self._server.restore(saved.arrays, saved.record)
        self._directory.keep_config()
        behind = {"round_id": self._server.round_id, "profile_attempts": self._server.profile_attempts}
        kept = self._directory.cut_events(lambda event: belongs_to_past(event, **behind))
        self._evaluated = next((event for event in reversed(kept) if event["event"] == "eval"), {})
        if self._server.done:
            self._directory.forget_received()
            if self._is_evaluated():
                self._save_adapters()  # what was lost or damaged since is there again
                return
        self._emit(
            {"event": "resume", "round": self._last_round, "skipped_states": list(saved.skipped) if saved else []}
        )
        if saved is not None and self._due() and not self._is_evaluated():
            self._evaluate()

    def _after(self, summary: Summary) -> None:
        self._emit({"event": "memory", "round": self._last_round, **self._measure_memory()})
        if summary.kind == "round" and self._due():
            self._evaluate()

    def _due(self) -> bool:
        every = self._server.config.eval_every
        return every > 0 and self._server.round_id > 0 and self._server.round_id % every == 0

    def _is_evaluated(self) -> bool:
        return self._evaluated.get("round") == self._last_round

    def _evaluate(self) -> None:
        """Write the adapters as they are, and score them if there is someone to do it."""
        self._save_adapters()
        if self._evaluator is None:
            return
        self._notify({"event": "phase", "name": "evaluate", "total": None})
        reply = self._evaluator.handle(self._server.evaluation_task(self._evaluator.name))
        if reply.error is not None:
            raise ChainfedError(f"evaluation after round {self._last_round}: {reply.error}")
        self._emit({"event": "memory", "round": self._last_round, **self._measure_memory()})
        self._evaluated = evaluation_event(self._last_round, reply.metrics)
        self._emit(self._evaluated)

    def _save_adapters(self) -> None:
        server = self._server
        about = {
            "adapter": server.config.adapter,
            "method": server.config.method,
            "rounds": server.round_id,
            "start_layer": server.start_layer,
            "task": server.task,
        }
        self._directory.save_adapters(server.parameters(), about)

    @property
    def _last_round(self) -> int:
        return self._server.round_id - 1

    def _emit(self, event: Event) -> None:
        self._directory.record(event)
        self._notify(event)

    def _notify(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)


class _Watched:
    """A transport that tells of each reply as it comes, so that a long exchange shows that it moves."""

    def __init__(self, transport: Transport, notify: Callable[[Event], None]) -> None:
        self._transport = transport
        self._notify = notify

    def exchange(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        phase: Event = {"event": "phase", "total": len(tasks)}
        for task in tasks[:1]:
            phase |= {"name": task.kind, "round": task.round_id}
            if task.stage is not None:
                phase["window"] = [task.stage.window.start, task.stage.window.stop]
            self._notify(phase)
        for done, reply in enumerate(self._transport.exchange(tasks), start=1):
            self._notify({"event": "step", "done": done, "total": len(tasks)})
            yield reply
