"""The report as one HTML page: nothing is fetched, nothing is executed. In: `RunLog`s; out: text.

Every text that came from a run is escaped here or in svg.py; a Content-Security-Policy forbids scripts and requests, in
case something slips through.
"""

from collections.abc import Sequence
from html import escape
from importlib import resources

from chainfed_engine._version import __version__
from chainfed_engine.report import charts, clients, svg
from chainfed_engine.report.charts import Chart
from chainfed_engine.report.reading import RunLog
from chainfed_engine.sizes import format_size

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(runs: Sequence[RunLog]) -> str:
    """A page about one run, or comparing several."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    body = [f"<h1>{escape(title)}</h1>", _one(runs[0]) if len(runs) == 1 else _several(runs)]
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n<body>{svg.patterns()}<main>\n"
        + "\n".join(body)
        + f"\n<footer>chainfed-engine {escape(__version__)}. Point at a mark to read its value.</footer>"
        "</main></body></html>\n"
    )


def _one(run: RunLog) -> str:
    return "\n".join(
        [
            f"<p>{escape(_status(run))}</p>",
            _notes(run),
            _tiles(run),
            _grid(
                charts.scores([run]),
                charts.losses([run]),
                charts.memory_parts([run]),
                charts.memory_rounds([run]),
                charts.windows(run),
                charts.similarity([run]),
                charts.time_total([run]),
                charts.time_rounds(run),
                charts.traffic([run]),
                clients.participation(run),
            ),
            _clients(run),
            _configuration(run),
        ]
    )


def _several(runs: Sequence[RunLog]) -> str:
    parts = [
        _overview(runs),
        _grid(
            charts.scores(runs),
            charts.losses(runs),
            charts.memory_parts(runs),
            charts.memory_rounds(runs),
            charts.time_total(runs),
            charts.traffic(runs),
            charts.similarity(runs),
        ),
        _differences(runs),
    ]
    for run in runs:
        parts.append(f"<h2>{escape(run.name)}</h2><p>{escape(_status(run))}</p>{_notes(run)}")
        parts += [_grid(charts.windows(run), clients.participation(run)), _clients(run), _configuration(run)]
    return "\n".join(parts)


def _status(run: RunLog) -> str:
    done, planned = len(run.rounds), run.planned_rounds
    method = run.config.get("train", {}).get("method", "")
    what = f"Method {method}. " if method else ""
    if planned is None:
        return f"{what}No rounds yet." if not run.evaluations else f"{what}Evaluated without training."
    state = f"{planned} rounds, finished" if run.is_finished else f"Unfinished: {done} of {planned} rounds"
    hint = (
        "" if run.evaluations else " No evaluation yet: [data] eval names the file, [federation] eval_every how often."
    )
    return f"{what}{state}.{hint}"


def _notes(run: RunLog) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in run.notes[-5:])
    return f'<ul class="notes">{items}</ul>' if items else ""


def _facts(run: RunLog) -> list[tuple[str, str, bool]]:
    """(name, value, whether it is a broken promise), the same for tiles and overview."""
    peak = max(run.measured.values(), default=None)
    over = bool(peak and run.budget_bytes and peak > run.budget_bytes)
    rounds = f"{len(run.rounds)} of {run.planned_rounds}" if run.planned_rounds else str(len(run.rounds))
    seconds = sum(run.seconds.values())
    refused = sum(len(each.rejected) for each in run.rounds.values()) + len(run.profile_rejected)
    facts = [
        (name.replace("_", " "), f"{value:.4f}", False) for name, value in run.last_scores.items() if name != "loss"
    ]
    return [
        *(facts or [("score", "none", False)]),
        ("rounds", rounds, False),
        ("peak memory", format_size(int(peak)) if peak is not None else "not measured", over),
        ("budget", format_size(int(run.budget_bytes)) if run.budget_bytes else "none", False),
        ("bytes sent", format_size(int(run.bytes_sent)), False),
        ("time", f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s", False),
        ("clients", str(len({name for each in run.rounds.values() for name in each.clients})), False),
        ("updates refused", str(refused), False),
    ]


def _tiles(run: RunLog) -> str:
    tiles = (
        f'<div class="tile{" over" if over else ""}"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value, over in _facts(run)
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _overview(runs: Sequence[RunLog]) -> str:
    names: list[str] = []
    for run in runs:
        names += [name for name, _, _ in _facts(run) if name not in names]
    names.sort(key=lambda name: name == "score")
    head = "".join(f'<th class="n">{escape(name)}</th>' for name in names)
    rows = []
    for run in runs:
        facts = {name: value for name, value, _ in _facts(run)}
        cells = "".join(f'<td class="n">{escape(facts.get(name, ""))}</td>' for name in names)
        rows.append(f"<tr><th>{escape(run.name)}</th>{cells}</tr>")
    return f'<div class="card" style="margin: 20px 0"><table><tr><th>run</th>{head}</tr>{"".join(rows)}</table></div>'


def _grid(*drawn: Chart | None) -> str:
    return f'<div class="grid">{"".join(_card(chart) for chart in drawn if chart is not None)}</div>'


def _card(chart: Chart) -> str:
    legend = "".join(
        f"<li>{svg.swatch(style, filled=chart.filled)}<span>{escape(name)}</span></li>" for style, name in chart.legend
    )
    listed = f'<ul class="legend">{legend}</ul>' if legend else ""
    return (
        f'<section class="card"><h3>{escape(chart.title)}</h3><p class="lead">{escape(chart.lead)}</p>'
        f"{chart.picture}{listed}</section>"
    )


def _clients(run: RunLog) -> str:
    rows = clients.client_rows(run)
    if not rows:
        return ""
    refused = sum(1 for row in rows if row.refused)
    shown = rows[: clients.MAX_CLIENTS_LISTED]
    cells = "".join(
        f'<tr><td>{escape(row.name)}</td><td class="n">{row.counted}</td><td class="n">{row.refused}</td>'
        f'<td class="n">{row.silent}</td><td>{escape(row.reason)}</td></tr>'
        for row in shown
    )
    more = f"<p>and {len(rows) - len(shown)} more</p>" if len(rows) > len(shown) else ""
    return (
        f"<details{' open' if refused else ''}><summary>{len(rows)} clients were asked, {refused} had updates refused"
        '</summary><table><tr><th>client</th><th class="n">rounds counted</th><th class="n">refused</th>'
        f'<th class="n">silent</th><th>reason of the last refusal</th></tr>{cells}</table>{more}</details>'
    )


def _configuration(run: RunLog) -> str:
    rows = "".join(
        f"<tr><td>[{escape(table)}] {escape(key)}</td><td>{escape(value)}</td></tr>"
        for table, values in run.config.items()
        for key, value in values.items()
    )
    return f"<details><summary>Configuration</summary><table>{rows}</table></details>" if rows else ""


def _differences(runs: Sequence[RunLog]) -> str:
    """The keys of the configurations that are not the same in all runs."""
    flat = [{(table, key): value for table, keys in run.config.items() for key, value in keys.items()} for run in runs]
    keys = sorted({key for each in flat for key in each})
    differing = [key for key in keys if len({each.get(key) for each in flat}) > 1]
    if not differing:
        return ""
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><td>[{escape(table)}] {escape(key)}</td>"
        + "".join(f"<td>{escape(each.get((table, key), ''))}</td>" for each in flat)
        + "</tr>"
        for table, key in differing
    )
    return (
        '<div class="card" style="margin-top: 16px"><h3>What differs in the configurations</h3>'
        f"<table><tr><th></th>{head}</tr>{rows}</table></div>"
    )
