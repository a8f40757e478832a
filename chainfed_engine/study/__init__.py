"""A study: methods x data x partitions x seeds, each run in a process of its own, and what comes of comparing them.

    definition (STUDY.toml) -> runner (one process and one row a run) -> compare -> table, page

Everything a study needs to be taken up again lies in its folder: `rows/` (one JSON object a finished run), `runs/`,
`logs/`. A run is known by a hash of its configuration, so that changing the study repeats only what it changes.
"""

from collections.abc import Callable
from pathlib import Path

from chainfed_engine.study.compare import Comparison, compare
from chainfed_engine.study.definition import Run, Study, load_study
from chainfed_engine.study.page import render
from chainfed_engine.study.runner import finished_rows, run_missing
from chainfed_engine.study.table import markdown

__all__ = ["Comparison", "Run", "Study", "compare", "load_study", "run_study"]


def run_study(
    study: Study, out: Path, *, jobs: int = 1, only_summary: bool = False, report: Callable[[str], None] = print
) -> int:
    """Run what is missing, then write `rows.jsonl`, `table.md` and `study.html` into `out`; returns how many runs
    failed. `report` gets a line a run."""
    from chainfed_engine.federation.files import write_text
    from chainfed_engine.study.rows import row_line

    out.mkdir(parents=True, exist_ok=True)
    failed = 0 if only_summary else run_missing(study, out, jobs=jobs, report=report)
    rows = finished_rows(study, out)
    comparison = compare(study, rows)
    write_text(out / "rows.jsonl", "".join(row_line(row) for row in rows))
    write_text(out / "table.md", markdown(comparison))
    write_text(out / "study.html", render(study, rows, comparison))
    return failed
