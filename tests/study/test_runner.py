"""A study for real on a random model: own processes, rows, nothing twice, kills, failures that name their cause."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from chainfed_engine.cli.main import main
from chainfed_engine.errors import CorruptFile, StorageError
from chainfed_engine.study import load_study
from chainfed_engine.study.runner import finished_rows, run_missing
from tests.study.conftest import write_rows

ONE_SEED = ("--set", "study.seeds=[0]")
ONE_RUN = (*ONE_SEED, "--set", 'study.methods=["chain"]', "--set", "study.reference=chain")


def start(folder: Path, store: Path, *more: str) -> int:
    return main(
        ["study", str(folder / "study.toml"), "--out", str(folder / "out"), "--set", f"run.model.store={store}", *more]
    )


def only_films(folder: Path) -> None:
    text = (folder / "study.toml").read_text()
    start_of, end = text.index("[data.by-site]"), text.index("[partition.even]")
    text = text[:start_of] + text[end:]
    (folder / "study.toml").write_text(text[: text.index("[partition.skewed]")] + text[text.index('[method."every') :])


def test_a_study_runs_once_writes_rows_table_and_page_and_repeats_nothing(
    folder: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only_films(folder)
    assert start(folder, store, *ONE_SEED) == 0
    out = folder / "out"
    first = {path.name: path.read_bytes() for path in (out / "rows").iterdir()}
    assert len(first) == 2
    row = json.loads(next(iter(first.values())))
    assert [point["rounds"] for point in row["curve"]] == [1, 2] and row["curve"][-1]["score"] == row["score"]
    counted = ("cpu_seconds", "seconds", "bytes_sent", "peak_rss_bytes", "predicted_peak_bytes", "steps")
    assert all(row[name] > 0 for name in counted)
    assert not list((out / "runs").glob("*/cache")), "caches go with the run"
    assert "everything at once" in (out / "table.md").read_text() and "<svg" in (out / "study.html").read_text()
    assert len((out / "rows.jsonl").read_text().splitlines()) == 2
    assert "## films, even" in capsys.readouterr().out

    changed_at = {path.name: path.stat().st_mtime_ns for path in (out / "rows").iterdir()}
    assert start(folder, store, *ONE_SEED) == 0
    assert changed_at == {path.name: path.stat().st_mtime_ns for path in (out / "rows").iterdir()}


def test_a_run_that_was_killed_starts_anew_and_others_are_kept(folder: Path, store: Path) -> None:
    only_films(folder)
    command = [
        sys.executable,
        "-m",
        "chainfed_engine",
        "study",
        str(folder / "study.toml"),
        "--out",
        str(folder / "out"),
    ]
    child = subprocess.Popen(
        [*command, "--set", f"run.model.store={store}", *ONE_SEED],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    rows = folder / "out" / "rows"
    deadline = time.monotonic() + 300
    while not (rows.is_dir() and any(rows.glob("*.json"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    kept = {path: path.stat().st_mtime_ns for path in rows.glob("*.json")}
    assert len(kept) == 1
    assert start(folder, store, *ONE_SEED) == 0
    assert len(list(rows.glob("*.json"))) == 2
    assert all(path.stat().st_mtime_ns == changed_at for path, changed_at in kept.items())


def test_a_class_that_is_not_in_the_training_data_fails_that_run_with_its_reason(
    folder: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only_films(folder)
    write_rows(folder / "held_out.jsonl", 6, ("good", "bad", "so-so"))
    assert start(folder, store, *ONE_RUN) == 2
    said = capsys.readouterr().err
    assert "unknown label 'so-so'; the model was trained on 'bad', 'good'" in said
    assert "1 of the runs failed" in said
    write_rows(folder / "held_out.jsonl", 6)
    assert start(folder, store, *ONE_RUN) == 0, "failed runs are tried again"


def test_one_class_only_fails_with_its_reason(folder: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only_films(folder)
    write_rows(folder / "films.jsonl", 6, ("good",))
    assert start(folder, store, *ONE_RUN) == 2
    assert "expected at least two labels, got only 'good'" in capsys.readouterr().err


def test_clients_with_one_sample_each_are_no_trouble(folder: Path, store: Path) -> None:
    only_films(folder)
    write_rows(folder / "films.jsonl", 3)
    assert start(folder, store, *ONE_RUN) == 0


def test_two_studies_do_not_share_a_folder(folder: Path) -> None:
    (folder / "out").mkdir()
    with open(folder / "out" / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="in use by another study"):
            run_missing(load_study(folder / "study.toml"), folder / "out", jobs=1, report=print)


def test_a_run_left_behind_by_a_killed_study_is_not_disturbed(folder: Path) -> None:
    study = load_study(folder / "study.toml", list(ONE_RUN[1::2]))
    said: list[str] = []
    with ExitStack() as stack:
        for run in study.runs:
            left_behind = folder / "out" / "runs" / run.name
            left_behind.mkdir(parents=True)
            fcntl.flock(stack.enter_context((left_behind / "lock").open("w")), fcntl.LOCK_EX)
        assert run_missing(study, folder / "out", jobs=2, report=said.append) == len(study.runs)
    assert "in use by a run that an earlier start of the study left behind" in said[-1]


def test_a_damaged_row_names_itself(folder: Path) -> None:
    study = load_study(folder / "study.toml")
    path = folder / "out" / "rows" / f"{study.runs[0].name}.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"name": 1}')
    with pytest.raises(CorruptFile, match="expected a row of a study"):
        finished_rows(study, folder / "out")
