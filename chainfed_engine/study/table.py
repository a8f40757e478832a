"""The comparison as Markdown: one table a cell, one over all of them. In: a `Comparison`; out: text."""

from chainfed_engine.study.compare import ALL, Cell, Comparison, Estimate, Reached, Result

COLUMNS = (
    "method",
    "score",
    "difference",
    "at equal seconds",
    "seconds to it",
    "bytes to it",
    "seconds",
    "MB sent",
    "peak MiB",
    "predicted",
)


def markdown(comparison: Comparison) -> str:
    study = comparison.study
    clock = "processor seconds of one run" if study.clock == "cpu" else "wall-clock seconds"
    parts = [
        f"# {study.name}",
        f"{comparison.num_rows} of {len(study.runs)} runs. Score: {comparison.measure or 'none yet'}, mean ± standard "
        f"error over seeds. Differences to {study.reference} within pairs of equal data, clients and seed, positive is "
        f"better; *at equal seconds*: at the last evaluation within {study.reference}'s time. *To it*: cost until "
        f"{study.reference}'s final score is first reached, relative to {study.reference}'s own, geometric mean over "
        f"the pairs that reach it. Seconds: {clock}, without evaluation.",
    ]
    for cell in comparison.cells:
        if results := comparison.of(cell):
            parts += [f"## {cell_name(cell)}", _table(results, COLUMNS)]
    if results := comparison.of(ALL):
        parts += ["## All together", _table(results, COLUMNS)]
    return "\n\n".join(parts) + "\n"


def cell_name(cell: Cell) -> str:
    data, partition = cell
    return "all together" if cell == ALL else f"{data}, {'by client' if partition == 'client' else partition}"


def cells_of_row(result: Result) -> list[str]:
    """The figures of `COLUMNS` as text, empty where there is none."""
    return [
        result.method,
        shown(result.score, 4),
        shown(result.difference, 4, sign=True),
        shown(result.at_equal_seconds, 4, sign=True),
        reached(result.seconds_to),
        reached(result.bytes_to),
        shown(result.seconds, 1),
        shown(result.megabytes, 2),
        "" if result.peak_mib is None else f"{result.peak_mib:.0f}",
        "" if result.predicted_mib is None else f"{result.predicted_mib:.0f}",
    ]


def shown(estimate: Estimate | None, digits: int, *, sign: bool = False) -> str:
    if estimate is None:
        return ""
    plus = "+" if sign else ""
    error = "" if estimate.error is None else f" ± {estimate.error:.{digits}f}"
    return f"{estimate.mean:{plus}.{digits}f}{error}"


def reached(cost: Reached | None) -> str:
    if cost is None:
        return ""
    if cost.ratio is None:
        return f"never (0 of {cost.pairs})"
    return f"{cost.ratio:.2f}x ({cost.reached} of {cost.pairs})"


def _table(results: list[Result], columns: tuple[str, ...]) -> str:
    rows = [cells_of_row(result) for result in results]
    used = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    lines = [[columns[index] for index in used], ["---" for _ in used]]
    lines += [[row[index].replace("|", "\\|") for index in used] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
