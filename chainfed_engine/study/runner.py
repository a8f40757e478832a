"""Runs what a study lacks, each run in a process of its own, so that its peak memory is its own. In: study, folder.

    configs/NAME.toml -> chainfed run -> runs/NAME/ -> rows/NAME.json

A row is written last and whole: a run without one is not finished and starts anew in an empty folder. Caches are
deleted with a finished run; its metrics, configuration and adapters stay.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from chainfed_engine._version import __version__
from chainfed_engine.errors import ChainfedError, CorruptFile, StorageError
from chainfed_engine.federation.files import write_text
from chainfed_engine.study.definition import Run, Study
from chainfed_engine.study.rows import Row, parse_row, read_run, row_line

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_missing(study: Study, out: Path, *, jobs: int, report: Callable[[str], None]) -> int:
    """Every run without a row; `jobs` at a time. Returns how many failed: those leave a log and are tried again."""
    with _locked(out, "another study"):
        missing = [run for run in study.runs if not _row_path(out, run).exists()]
        report(f"{len(study.runs) - len(missing)} of {len(study.runs)} runs are done")
        children: set[subprocess.Popen[bytes]] = set()

        def one(numbered: tuple[int, Run]) -> bool:
            number, run = numbered
            where = f"[{number + 1}/{len(missing)}] {run.method}, {run.data}, {run.partition}, seed {run.seed}"
            try:
                row = _run(study, run, out, children)
            except ChainfedError as error:
                report(f"{where}: {error}")
                return False
            report(f"{where}: {row.measure} {row.score:.4f} in {row.seconds:.0f} s")
            return True

        with ThreadPoolExecutor(max_workers=jobs) as pool:
            try:
                return sum(not done for done in pool.map(one, enumerate(missing)))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in list(children):
                    child.terminate()
                raise


def finished_rows(study: Study, out: Path) -> list[Row]:
    """Rows of this study's finished runs, in its order; rows of runs that it no longer has are left out."""
    paths = [_row_path(out, run) for run in study.runs]
    return [parse_row(path.read_text(encoding="utf-8"), str(path)) for path in paths if path.exists()]


def _run(study: Study, run: Run, out: Path, children: set[subprocess.Popen[bytes]]) -> Row:
    folder, log = out / "runs" / run.name, out / "logs" / f"{run.name}.log"
    config = out / "configs" / f"{run.name}.toml"
    if folder.is_dir():
        with _locked(folder, "a run that an earlier start of the study left behind"):
            shutil.rmtree(folder, ignore_errors=True)
    for parent in (folder.parent, log.parent, config.parent, _row_path(out, run).parent):
        parent.mkdir(parents=True, exist_ok=True)
    write_text(config, run.config_text)
    environment = {**os.environ, **dict.fromkeys(_THREADS, str(study.threads))}
    command = [sys.executable, "-m", "chainfed_engine", "run", str(config), "--out", str(folder)]
    started = time.monotonic()
    with log.open("wb") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        children.add(child)
        try:
            code = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        finally:
            children.discard(child)
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output")
        raise ChainfedError(
            f"ended with code {code} after {time.monotonic() - started:.0f} s: {said.strip()} (see {log})"
        )
    try:
        row = read_run(run, folder, __version__)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ChainfedError):
            raise
        raise CorruptFile(f"{folder}: metrics.jsonl cannot be read: {error}") from error
    shutil.rmtree(folder / "cache", ignore_errors=True)
    write_text(_row_path(out, run), row_line(row))
    return row


def _row_path(out: Path, run: Run) -> Path:
    return out / "rows" / f"{run.name}.json"


@contextmanager
def _locked(folder: Path, owner: str) -> Iterator[None]:
    """Nobody else works in this folder: neither a study nor, in a run's, the run itself."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(f"{folder}: in use by {owner}; wait for it or end it") from error
        yield
    finally:
        os.close(descriptor)
