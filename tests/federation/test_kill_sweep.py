"""A run is ended at every change that it makes to the file system, taken up again, and must end with the same bits.

Here a short run, a third of its points each time; `make kill-sweep` tries every point of a longer run, half-done writes
at every point that has them, and a second kill while the run is taken up.
"""

import json
import os
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.federation.fake_site import config, run
from tests.federation.kill_points import count_points, killed_at

FULL = os.environ.get("CHAINFED_KILL_SWEEP") == "full"
ROUNDS, EVERY = (12, 1) if FULL else (3, 3)
# What differs from run to run.
PASSING = ("seconds", "cpu_seconds", "bytes_sent", "bytes_down", "bytes_up", "peak_rss_bytes")


def _run(path: Path) -> None:
    """What a user does after a crash: take the run up if there is one, else start it."""
    run(path, config(rounds=ROUNDS, eval_every=2), resume=(path / "state").is_dir())


def _lasting(path: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in event.items() if name not in PASSING} for event in events]
    return [event for event in kept if event["event"] not in ("resume", "memory")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    path = tmp_path_factory.mktemp("whole") / "run"
    return path, count_points(partial(_run, path))


def _check(path: Path, whole: Path, where: str) -> None:
    _run(path)
    assert (path / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes(), where
    assert _lasting(path) == _lasting(whole), where
    assert not [*(path / "state" / "received").iterdir(), *path.rglob("*.partial")], where
    shutil.rmtree(path)


@pytest.mark.parametrize("torn", [False, True], ids=["before", "half-done"])
@pytest.mark.timeout(1800)
def test_a_run_killed_at_every_write_ends_with_the_same_bits(
    undisturbed: tuple[Path, list[tuple[str, str]]], tmp_path: Path, torn: bool
) -> None:
    whole, points = undisturbed
    half_done = [op == "append" or (op == "sync" and name.endswith(".partial")) for op, name in points]
    chosen = [index for index in range(len(points)) if half_done[index] or not torn][torn::EVERY]
    assert len(chosen) >= 15
    for index in chosen:
        path = tmp_path / f"at-{index}"
        assert killed_at(index, partial(_run, path), torn=torn)
        _check(path, whole, f"killed at operation {index}: {points[index]}")


@pytest.mark.timeout(1800)
def test_a_run_killed_again_while_it_is_taken_up_ends_with_the_same_bits(
    undisturbed: tuple[Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    whole, points = undisturbed
    generator = random.Random(3)
    for attempt in range(100 if FULL else 5):
        path, kills = tmp_path / f"attempt-{attempt}", []
        while killed_at(point := generator.randrange(len(points)), partial(_run, path), torn=generator.random() < 0.5):
            kills.append(point)
        _check(path, whole, f"killed at operations {kills}")


def test_the_sweep_reaches_replies_states_metrics_and_adapters(undisturbed: tuple[Path, list[tuple[str, str]]]) -> None:
    _, points = undisturbed
    names = {name.split("-")[0].split(".")[0].strip(".") or name for _, name in points if not name.startswith(".")}
    assert {"reply", "state", "metrics", "adapters", "config", "received", "stand_in"} <= names
    assert {"append", "write", "sync", "rename", "remove", "make folder", "open", "sync folder"} <= {
        operation for operation, _ in points
    }
