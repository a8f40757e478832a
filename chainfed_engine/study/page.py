"""The study as one HTML page: table and curves of accuracy against rounds, time and bytes. In: rows; out: text.

Nothing is fetched and nothing is executed; lines differ in dash and marker as well as in colour, as in a run's report.
Curves are means over the seeds of a cell, at the rounds that all of them were evaluated at.
"""

from collections.abc import Callable, Sequence
from html import escape
from importlib import resources

from chainfed_engine._version import __version__
from chainfed_engine.report import svg
from chainfed_engine.study.compare import ALL, Comparison, Result, seconds_of
from chainfed_engine.study.definition import Study
from chainfed_engine.study.rows import Point, Row
from chainfed_engine.study.table import COLUMNS, cell_name, cells_of_row

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_Axis = tuple[str, Callable[[Point], float]]


def render(study: Study, rows: Sequence[Row], comparison: Comparison) -> str:
    """A page with a section a cell, and one over all."""
    title = escape(f"Study {study.name}")
    style = resources.files("chainfed_engine.report").joinpath("page.css").read_text(encoding="utf-8")
    clock = "processor time" if study.clock == "cpu" else "wall-clock time"
    lead = (
        f"{comparison.num_rows} of {len(study.runs)} runs, compared with {study.reference} within pairs of equal data, "
        f"clients and seed. Mean ± standard error; differences are positive where the method is better. Seconds are "
        f"{clock} without evaluation; “to it” is the cost until the reference's final score is first reached, "
        "relative to the reference's own."
    )
    body = [f"<h1>{title}</h1>", f"<p>{escape(lead)}</p>"]
    sections = [*([ALL] if comparison.of(ALL) else []), *comparison.cells]
    for cell in sections:
        if results := comparison.of(cell):
            body += [f"<h2>{escape('All together' if cell == ALL else cell_name(cell))}</h2>", _table(results)]
            body.append(_charts(study, [row for row in rows if (row.data, row.partition) == cell]))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title>\n<style>\n{style}</style></head>\n<body>{svg.patterns()}<main>\n"
        + "\n".join(body)
        + f"\n<footer>chainfed-engine {escape(__version__)}. Point at a mark to read its value.</footer>"
        + "</main></body></html>\n"
    )


def _charts(study: Study, rows: Sequence[Row]) -> str:
    """Curves of one cell; none where nothing was evaluated more than once."""
    if not any(len(row.curve) > 1 for row in rows):
        return ""
    axes: tuple[_Axis, ...] = (
        ("rounds", lambda point: float(point.rounds)),
        ("processor seconds" if study.clock == "cpu" else "seconds", seconds_of(study)),
        ("MB sent", lambda point: point.bytes_sent / 1e6),
    )
    measure = rows[0].measure.replace("_", " ")
    curves = {method: mean_curve([row for row in rows if row.method == method]) for method in study.methods}
    cards: list[str] = []
    for methods in _groups(study):
        lines = {method: curves[method] for method in methods if curves[method]}
        if set(lines) <= {study.reference} and cards:
            continue
        styles = {method: style for style, method in enumerate(methods)}
        named = (f"<li>{svg.swatch(styles[method], filled=False)}{escape(method)}</li>" for method in lines)
        legend = f'<ul class="legend">{"".join(named)}</ul>'
        for label, place in axes:
            title = f"{measure.capitalize()} against {label}"
            picture = _curves(title, lines, styles, place, label, measure)
            cards.append(f'<section class="card"><h3>{escape(title)}</h3>{picture}{legend}</section>')
    return f'<div class="grid" style="margin-top: 16px">{"".join(cards)}</div>'


def _groups(study: Study) -> list[list[str]]:
    """Methods of one chart each: the reference and as many others as there are styles to tell them apart."""
    others = [method for method in study.methods if method != study.reference]
    size = svg.NUM_STYLES - 1
    groups = [others[first : first + size] for first in range(0, len(others), size)] or [[]]
    return [[study.reference, *group] for group in groups]


def mean_curve(rows: Sequence[Row]) -> list[Point]:
    """Means over the runs at the rounds that all of them were evaluated at."""
    if not rows:
        return []
    by_round = [{point.rounds: point for point in row.curve} for row in rows]
    common = sorted(set.intersection(*(set(points) for points in by_round)))
    return [_mean([points[number] for points in by_round]) for number in common]


def _mean(points: Sequence[Point]) -> Point:
    count = len(points)
    return Point(
        points[0].rounds,
        sum(point.score for point in points) / count,
        sum(point.seconds for point in points) / count,
        sum(point.cpu_seconds for point in points) / count,
        round(sum(point.bytes_sent for point in points) / count),
    )


def _curves(
    title: str,
    lines: dict[str, list[Point]],
    styles: dict[str, int],
    place: Callable[[Point], float],
    x_label: str,
    y_label: str,
) -> str:
    points = [point for line in lines.values() for point in line]
    scores = [point.score for point in points]
    margin = 0.06 * (max(scores) - min(scores)) or 0.01
    frame = svg.Frame(
        (0.0, max(map(place, points))), (min(scores) - margin, max(scores) + margin), x_label=x_label, y_label=y_label
    )
    for method, line in lines.items():
        frame.line([(place(point), point.score) for point in line], styles[method], method)
    return frame.svg(title)


def _table(results: Sequence[Result]) -> str:
    rows = [cells_of_row(result) for result in results]
    used = [index for index in range(len(COLUMNS)) if any(row[index] for row in rows)]
    head = "".join(f"<th{'' if index == 0 else ' class=n'}>{escape(COLUMNS[index])}</th>" for index in used)
    lines = "".join(
        "<tr>" + "".join(f"<td{'' if index == 0 else ' class=n'}>{escape(row[index])}</td>" for index in used) + "</tr>"
        for row in rows
    )
    return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
