"""Who took part, and whose updates were refused and why. In: one `RunLog`; out: a plot, and rows for a table."""

from collections import Counter
from dataclasses import dataclass

from chainfed_engine.report import svg
from chainfed_engine.report.charts import Chart
from chainfed_engine.report.reading import RunLog

MAX_CLIENTS_DRAWN = 30
MAX_CLIENTS_LISTED = 500
_ROW, _TOP, _BOTTOM, _LEFT = 14, 10, 40, 150


@dataclass(frozen=True)
class ClientRow:
    """`counted`: rounds whose aggregate holds the client's update; `silent`: rounds in which it did not answer in time;
    `reason`: why it was refused the last time."""

    name: str
    counted: int
    refused: int
    silent: int
    reason: str


def client_rows(run: RunLog) -> list[ClientRow]:
    """Every client that was asked in a round: those refused first, then by number of rounds, then by name."""
    counted: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    silent: Counter[str] = Counter()
    reasons: dict[str, str] = dict(run.profile_rejected)
    refused.update(run.profile_rejected.keys())
    for _, each in sorted(run.rounds.items()):
        counted.update(each.clients)
        refused.update(each.rejected.keys())
        silent.update(each.silent)
        reasons.update(each.rejected)
    names = counted.keys() | refused.keys() | silent.keys()
    rows = [ClientRow(name, counted[name], refused[name], silent[name], reasons.get(name, "")) for name in names]
    return sorted(rows, key=lambda row: (-row.refused, -row.silent, -row.counted, row.name))


def participation(run: RunLog) -> Chart | None:
    """Clients against rounds: a box where the update counted, a cross where it was refused, a dash for silence."""
    rows = client_rows(run)
    if not rows or not run.rounds:
        return None
    drawn = rows[:MAX_CLIENTS_DRAWN]
    rounds = svg.thinned(sorted(run.rounds), svg.MAX_POINTS)
    places = {row.name: index for index, row in enumerate(drawn)}
    ticks = [(index + 0.5, svg.shortened(row.name)) for index, row in enumerate(drawn)]
    frame = svg.Frame(
        (0.5, rounds[-1] + 1.5), (len(drawn), 0), x_label="round", y_label="", y_ticks=ticks,
        height=_TOP + _BOTTOM + _ROW * len(drawn), left=_LEFT,
    )  # fmt: skip
    for index in rounds:
        each = run.rounds[index]
        for name in each.clients:
            if name in places:
                row = places[name]
                frame.box(
                    index + 0.62, index + 1.38, row + 0.16, row + 0.84, "part p0", f"{name}, round {index + 1}: counted"
                )
        for name, reason in each.rejected.items():
            if name in places:
                x, y = frame.x(index + 1), frame.y(places[name] + 0.5)
                frame.add(svg.marker(5, x, y, f"{name}, round {index + 1}: refused, {reason}"))
        for name in each.silent:
            if name in places:
                x, y = frame.x(index + 1), frame.y(places[name] + 0.5)
                frame.add(svg.marker(7, x, y, f"{name}, round {index + 1}: no answer in time"))
    more = f"; the {len(drawn)} busiest of {len(rows)}" if len(rows) > len(drawn) else ""
    lead = f"A box: the update counted; a cross: it was refused; a dash: no answer came in time{more}."
    return Chart("Who took part", lead, frame.svg("participation of clients by round"))
