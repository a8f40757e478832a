"""`chainfed report`: run directories in, one self-contained HTML page out. Needs no plotting library and no network."""

from collections.abc import Sequence
from pathlib import Path

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.report.page import render
from chainfed_engine.report.reading import RunLog, read_run

__all__ = ["MAX_RUNS", "RunLog", "read_run", "render", "write_report"]

MAX_RUNS = 8  # as many as there are dashes and markers


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page about one run directory, or comparing up to `MAX_RUNS`, and return its path.

    `out` defaults to `report.html` in the directory of a single run and in the working directory for several. A run
    that is going on may be reported on. Raises StorageError for a directory without metrics, InvalidArgument for none
    or too many.
    """
    if not 1 <= len(runs) <= MAX_RUNS:
        raise InvalidArgument(f"report: expected 1 to {MAX_RUNS} run directories, got {len(runs)}")
    paths = [Path(run) for run in runs]
    logs = [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    target = Path(out) if out is not None else (paths[0] if len(paths) == 1 else Path()) / "report.html"
    from chainfed_engine.federation.files import write_text

    write_text(target, render(logs))
    return target


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with the folder above where they would be equal, and a number where even that is not enough."""
    resolved = [path.resolve() for path in paths]
    names = [path.name for path in resolved]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.name}" for path in resolved]
    return [f"{name} ({index + 1})" if names.count(name) > 1 else name for index, name in enumerate(names)]
