"""The plots of a report. In: one or several `RunLog`s; out: a `Chart` each, or None where a run has nothing to show.

Lines carry a dash and a marker for each run, stacked parts a hatching for each part: all can be read without colour.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from chainfed_engine.report import svg
from chainfed_engine.report.reading import Round, RunLog, parts_of_round
from chainfed_engine.sizes import format_size

_BAR_LEFT = 150
_MAX_COLUMNS = 120
_MOST_SQUEEZED = 1.5  # a bar takes at least two thirds of its frame's width, wherever the budget lies
_MIB, _MB = float(1 << 20), 1e6
OTHER = "other parts"


@dataclass(frozen=True)
class Chart:
    """`lead`: one sentence that says how to read it. `legend`: (style, name); `filled` for parts, else lines."""

    title: str
    lead: str
    picture: str
    legend: Sequence[tuple[int, str]] = ()
    filled: bool = False


def scores(runs: Sequence[RunLog]) -> Chart | None:
    """Accuracy or token loss by round; bars where every run was evaluated once."""
    measure = next((name for run in runs for name in ("accuracy", "token_loss") if name in run.last_scores), None)
    if measure is None:
        return None
    label = measure.replace("_", " ")
    lines = {
        run.name: [(index + 1, each[measure]) for index, each in sorted(run.evaluations.items()) if measure in each]
        for run in runs
    }
    better = "higher is better" if measure == "accuracy" else "lower is better"
    if max(map(len, lines.values())) > 1:
        lead = f"Of the whole model on the evaluation data; {better}."
        return _lines(label.capitalize(), lead, lines, "rounds done", label, within_one=measure == "accuracy")
    if len(runs) < 2:
        return None
    rows = [(name, {label: points[-1][1]}) for name, points in lines.items() if points]
    picture = _bars(rows, [label], label, lambda value: f"{value:.4f}")
    return Chart(label.capitalize(), f"Of the whole model at the end; {better}.", picture)


def losses(runs: Sequence[RunLog]) -> Chart | None:
    lines = {
        run.name: [(index + 1, each.loss) for index, each in sorted(run.rounds.items()) if each.loss is not None]
        for run in runs
    }
    if not any(lines.values()):
        return None
    lead = "Mean over the clients of a round, each window's own loss: it jumps when the window moves."
    return _lines("Training loss", lead, lines, "round", "loss")


def memory_parts(runs: Sequence[RunLog]) -> Chart | None:
    """Predicted peak by part, the measured peak and the budget."""
    planned = [run for run in runs if run.plan]
    if not planned:
        return None
    parts, predicted = _largest_parts([_merged(run.plan) for run in planned])
    rows: list[tuple[str, Mapping[str, float]]] = []
    for run, values in zip(planned, predicted, strict=True):
        rows.append((run.name if len(runs) > 1 else "predicted", values))
        if run.measured:
            rows.append(("measured", {"measured peak": max(run.measured.values())}))
    limits = sorted({run.budget_bytes for run in planned if run.budget_bytes})
    marks = [(value / _MIB, f"budget {format_size(int(value))}") for value in limits[:3]]
    shown = [(name, {part: value / _MIB for part, value in values.items()}) for name, values in rows]
    picture = _bars(shown, [*parts, "measured peak"], "MiB", lambda value: f"{value:.0f} MiB", marks)
    lead = "What the planner counted, part by part, beside the largest resident set that the kernel saw."
    return Chart(
        "Memory by part", lead, picture, _legend(parts, predicted, lambda value: format_size(int(value))), filled=True
    )


def memory_rounds(runs: Sequence[RunLog]) -> Chart | None:
    lines = {run.name: [(index + 1, peak / _MIB) for index, peak in sorted(run.measured.items())] for run in runs}
    if not any(lines.values()):
        return None
    limits = {
        **{run.predicted_peak_bytes: "predicted" for run in runs if run.predicted_peak_bytes and len(runs) == 1},
        **{run.budget_bytes: "budget" for run in runs if run.budget_bytes},
    }
    references = [(value / _MIB, f"{name} {format_size(int(value))}") for value, name in list(limits.items())[:4]]
    lead = "Largest resident set so far, of the whole process."
    return _lines("Peak memory", lead, lines, "rounds done", "MiB", references=references, from_zero=True)


def time_total(runs: Sequence[RunLog]) -> Chart | None:
    parts, rows = _largest_parts([run.seconds for run in runs])
    if not parts:
        return None
    named = [(run.name, values) for run, values in zip(runs, rows, strict=True)]
    picture = _bars(named, parts, "seconds", lambda value: f"{svg.number(round(value, 1))} s")
    lead = "Summed over the rounds. prepare: prefix and cache; train: the window's steps; other: transport and checks."
    return Chart("Time by part", lead, picture, _legend(parts, rows, lambda value: f"{value:.1f} s"), filled=True)


def time_rounds(run: RunLog) -> Chart | None:
    rounds = [run.rounds[index] for index in sorted(run.rounds)]
    parts, values = _largest_parts([parts_of_round(each) for each in rounds])
    return _columns("Time of each round", "", rounds, parts, values, "seconds") if parts else None


def traffic(runs: Sequence[RunLog]) -> Chart | None:
    """Bytes of each round for one run, running totals for several."""
    if not any(each.bytes_down + each.bytes_up for run in runs for each in run.rounds.values()):
        return None
    if len(runs) > 1:
        lines = {run.name: _running_total(run) for run in runs}
        return _lines("Bytes sent", "Running total, both ways.", lines, "rounds done", "MB", from_zero=True)
    rounds = [runs[0].rounds[index] for index in sorted(runs[0].rounds)]
    parts = ["to clients", "from clients"]
    values = [{parts[0]: each.bytes_down / _MB, parts[1]: each.bytes_up / _MB} for each in rounds]
    lead = f"Arrays on the wire. Profiles before and between rounds took {runs[0].profile_bytes / _MB:.1f} MB more."
    return _columns("Bytes sent", lead, rounds, parts, values, "MB")


def similarity(runs: Sequence[RunLog]) -> Chart | None:
    """CKA by layer and where it made the chain start."""
    lines = {run.name: [(layer, score) for layer, score in enumerate(run.cka)] for run in runs}
    if not any(lines.values()):
        return None
    threshold = _config_number(runs[0], "chain", "threshold") if len(runs) == 1 else None
    references = [(threshold, f"threshold {svg.number(threshold)}")] if threshold is not None else []
    starts = [
        (float(run.start_layer), f"start layer {run.start_layer}") for run in runs[:1] if run.start_layer is not None
    ]
    lead = (
        "Similarity of each layer's output to the model's input (CKA): layers above the threshold are left as they are."
    )
    return _lines(
        "Where the chain starts", lead, lines, "layer", "CKA", references=references, verticals=starts, within_one=True
    )


def windows(run: RunLog) -> Chart | None:
    """Which layers were trained in which round."""
    placed = [each for _, each in sorted(run.rounds.items()) if each.window]
    if not placed:
        return None
    last, layers = max(run.rounds) + 1, run.num_layers
    layer_ticks = [(tick + 0.5, str(int(tick))) for tick in svg.ticks(0, layers - 1, 6, whole=True)]
    frame = svg.Frame((0.5, last + 0.5), (0, layers), x_label="round", y_label="layer", y_ticks=layer_ticks, height=230)
    for each in svg.thinned(placed, svg.MAX_POINTS):
        assert each.window is not None
        first, stop = each.window
        state = "part p0" if each.accepted else "part refused"
        outcome = "" if each.accepted else ", no usable update"
        label = f"round {each.index + 1}: layers {first} to {stop - 1}{outcome}"
        frame.box(each.index + 0.6, each.index + 1.4, first + 0.06, stop - 0.06, state, label)
    if run.start_layer:
        frame.reference(run.start_layer, f"start layer {run.start_layer}", below=True)
    lead = "Layers whose adapters a round trained; those above were not even loaded."
    if len(placed) < len(run.rounds):
        lead += " Rounds without a box trained the classifier alone."
    return Chart("Position of the window", lead, frame.svg("window position by round"))


def _running_total(run: RunLog) -> list[tuple[float, float]]:
    total = run.profile_bytes
    points: list[tuple[float, float]] = []
    for index, each in sorted(run.rounds.items()):
        total += each.bytes_down + each.bytes_up
        points.append((index + 1, total / _MB))
    return points


def _lines(
    title: str,
    lead: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    references: Sequence[tuple[float, str]] = (),
    verticals: Sequence[tuple[float, str]] = (),
    from_zero: bool = False,
    within_one: bool = False,
) -> Chart:
    points = [point for line in lines.values() for point in line]
    xs = [x for x, _ in points]
    ys = [y for _, y in points] + [value for value, _ in references]
    low, high = min(ys), max(ys)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    top = min(high + margin, 1.0) if within_one else high + margin
    frame = svg.Frame(
        (min(xs), max(xs)), (0.0 if from_zero else max(0.0, low - margin), max(top, high)),
        x_label=x_label, y_label=y_label,
    )  # fmt: skip
    for index, (value, label) in enumerate(references):
        frame.reference(value, label, left=index % 2 == 1)  # two that lie close stay legible
    for value, label in verticals:
        frame.vertical(value, label, lower=within_one)
    for style, (name, line) in enumerate(lines.items()):
        if line:
            frame.line(line, style, name)
    legend = [(style, name) for style, (name, line) in enumerate(lines.items()) if line] if len(lines) > 1 else []
    return Chart(title, lead, frame.svg(title), legend)


def _columns(
    title: str,
    lead: str,
    rounds: Sequence[Round],
    parts: Sequence[str],
    values: Sequence[Mapping[str, float]],
    unit: str,
) -> Chart:
    """One stacked column a round; neighbouring rounds are added up where there are too many for the width."""
    group = -(-len(rounds) // _MAX_COLUMNS)
    totals = [sum(each.values()) for each in values]
    highest = max(sum(totals[at : at + group]) for at in range(0, len(totals), group))
    frame = svg.Frame((0.5, len(rounds) + 0.5), (0, 1.05 * highest), x_label="round", y_label=unit)
    for at in range(0, len(rounds), group):
        base = 0.0
        last = min(at + group, len(rounds))
        first_id, last_id = rounds[at].index + 1, rounds[last - 1].index + 1
        name = f"round {first_id}" if first_id == last_id else f"rounds {first_id} to {last_id}"
        for style, part in enumerate(parts):
            size = sum(each.get(part, 0.0) for each in values[at:last])
            label = f"{name}, {part}: {svg.number(round(size, 3))} {unit}"
            frame.box(at + 0.5 + 0.1 * group, last + 0.5 - 0.1 * group, base, base + size, f"part p{style}", label)
            base += size
    if group > 1:
        lead = f"{lead} A column is {group} rounds.".strip()
    return Chart(title, lead, frame.svg(title), list(enumerate(parts)), filled=True)


def _bars(
    rows: Sequence[tuple[str, Mapping[str, float]]],
    parts: Sequence[str],
    unit: str,
    shown: Callable[[float], str],
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Horizontal stacked bars, each with its total; `marks`: vertical lines with a name above them, the name alone
    where the line would squeeze the bars."""
    widest = max(sum(values.values()) for _, values in rows) or 1.0
    highest = max([widest, *(value for value, _ in marks if value <= _MOST_SQUEEZED * widest)])
    height = svg.TOP + svg.BOTTOM + 34 * len(rows) + 18 * len(marks)
    frame = svg.Frame(
        (0, 1.16 * highest), (len(rows), 0), x_label=unit, y_label="", y_ticks=(), x_ticks=svg.labelled(0, highest),
        height=height, left=_BAR_LEFT, top=svg.TOP + 18 * len(marks),
    )  # fmt: skip
    for row, (name, values) in enumerate(rows):
        start = 0.0
        for style, part in enumerate(parts):
            if size := values.get(part, 0.0):
                classes = "part solid" if part == "measured peak" else f"part p{style}"
                frame.box(start, start + size, row + 0.18, row + 0.82, classes, f"{name}, {part}: {shown(size)}")
                start += size
        frame.add(svg.text(_BAR_LEFT - 8, frame.y(row + 0.5) + 4, svg.shortened(name), "end"))
        frame.add(svg.text(frame.x(start) + 6, frame.y(row + 0.5) + 4, shown(start), "start", "value"))
    for index, (value, label) in enumerate(marks):
        if value <= highest:
            frame.vertical(value, label, above=index + 1)
        else:
            at = frame.top - 18 * (index + 1) + 13
            frame.add(svg.text(frame.x(1.16 * highest), at, f"{label}, beyond this scale →", "end", "note"))
    return frame.svg(", ".join(name for name, _ in rows))


def _largest_parts(rows: Sequence[Mapping[str, float]]) -> tuple[list[str], list[dict[str, float]]]:
    """The parts that are anything, in their order; those beyond the number of styles are added up in `OTHER`."""
    peak: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            peak[name] = max(value, peak.get(name, 0.0))
    largest = max(peak.values(), default=0.0)
    kept = [name for name, value in peak.items() if value > 0.002 * largest]
    if len(kept) >= svg.NUM_STYLES:
        by_size = sorted(kept, key=lambda name: -peak[name])[: svg.NUM_STYLES - 1]
        kept = [name for name in kept if name in by_size]
    parts = [{name: row[name] for name in kept if name in row} for row in rows]
    rest = [sum(value for name, value in row.items() if name not in kept) for row in rows]
    if max(rest, default=0.0) > 0.002 * largest:
        kept.append(OTHER)
        parts = [{**part, OTHER: value} for part, value in zip(parts, rest, strict=True)]
    return kept, parts


def _merged(plan: Mapping[str, float]) -> dict[str, float]:
    """`activations (window step)` and `activations (prefix fill)` are one part, so that runs compare."""
    merged: dict[str, float] = {}
    for name, value in plan.items():
        name = name.split(" (")[0]
        merged[name] = merged.get(name, 0.0) + value
    return merged


def _legend(
    parts: Sequence[str], rows: Sequence[Mapping[str, float]], shown: Callable[[float], str]
) -> list[tuple[int, str]]:
    """(style, name); with the size of a part where one run is shown, for small parts are slivers in its bar."""
    if len(rows) > 1:
        return list(enumerate(parts))
    return [(style, f"{part} {shown(rows[0].get(part, 0.0))}") for style, part in enumerate(parts)]


def _config_number(run: RunLog, table: str, key: str) -> float | None:
    try:
        return float(run.config[table][key])
    except (KeyError, ValueError):
        return None
