"""One finished run as one flat JSON object. In: a run's metrics.jsonl; out: a `Row`.

`curve`: one point an evaluation, with the rounds, seconds and bytes spent until then (evaluation itself not counted).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chainfed_engine.errors import CorruptFile, NonFiniteLoss
from chainfed_engine.study.definition import Run

MEASURES = ("accuracy", "token_loss")


@dataclass(frozen=True)
class Point:
    """`seconds`: wall-clock time of the exchanges; `cpu_seconds`: of all threads of the process during them."""

    rounds: int
    score: float
    seconds: float
    cpu_seconds: float
    bytes_sent: int


@dataclass(frozen=True)
class Row:
    """`measure`: accuracy (more is better) or token_loss; `score`: the last. Peaks in bytes, of the whole process."""

    name: str
    method: str
    data: str
    partition: str
    seed: int
    measure: str
    score: float
    rounds: int
    steps: int
    seconds: float
    cpu_seconds: float
    bytes_sent: int
    predicted_peak_bytes: int
    peak_rss_bytes: int
    num_left_out: int
    start_layer: int | None
    curve: tuple[Point, ...]
    version: str = ""


def read_run(run: Run, folder: Path, version: str) -> Row:
    """The row of a finished run. Raises CorruptFile where the run did not leave an evaluation at its end, NonFiniteLoss
    where an evaluation was not finite."""
    path = folder / "metrics.jsonl"
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rounds, steps, seconds, cpu_seconds, bytes_sent = 0, 0, 0.0, 0.0, 0
    curve: list[Point] = []
    measure = ""
    for event in events:
        if event["event"] in ("round", "profile"):
            parts = event["seconds"]
            seconds += parts["transport"] + parts["server"]
            cpu_seconds += event["cpu_seconds"]
            bytes_sent += event["bytes_sent"]
            steps += int(event.get("steps", 0))
            rounds = event["round"] + 1
        elif event["event"] == "eval":
            measure = next(name for name in MEASURES if name in event)
            if event[measure] is None:
                raise NonFiniteLoss(f"{path}: {measure} after round {event['round']} is not finite; lower [train] lr")
            curve.append(Point(rounds, event[measure], seconds, cpu_seconds, bytes_sent))
    if not curve or curve[-1].rounds != rounds:
        raise CorruptFile(f"{path}: no evaluation after the last round; does the study's data name eval?")
    memory = [event for event in events if event["event"] == "memory"]
    left_out = [event for event in events if event["event"] == "clients"]
    starts = [event["start_layer"] for event in events if event["event"] in ("round", "profile")]
    return Row(
        name=run.name,
        method=run.method,
        data=run.data,
        partition=run.partition,
        seed=run.seed,
        measure=measure,
        score=curve[-1].score,
        rounds=rounds,
        steps=steps,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        bytes_sent=bytes_sent,
        predicted_peak_bytes=max((event["predicted_peak_bytes"] for event in memory), default=0),
        peak_rss_bytes=max((event.get("budget_peak_bytes", event["peak_rss_bytes"]) for event in memory), default=0),
        num_left_out=sum(len(event["left_out"]) for event in left_out),
        start_layer=starts[-1] if starts else None,
        curve=tuple(curve),
        version=version,
    )


def row_line(row: Row) -> str:
    """The row as a line of JSON."""
    return json.dumps(asdict(row)) + "\n"


def parse_row(text: str, where: str) -> Row:
    """A row from its JSON. Raises CorruptFile."""
    try:
        fields: Mapping[str, Any] = json.loads(text)
        return Row(**{**fields, "curve": tuple(Point(**point) for point in fields["curve"])})
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptFile(
            f"{where}: expected a row of a study, got {error!r:.80}; delete it to run it again"
        ) from error
