"""Kills are real: SIGKILL to a process of its own, then another process takes the run up."""

import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from chainfed_engine.errors import ConfigError, CorruptFile, InvalidArgument
from chainfed_engine.federation import read_adapters
from tests.federation.fake_site import SHAPE, config, run


def _start(path: Path, *, resume: bool = False, kill_at: int = -1, event_seconds: float = 0) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_run, args=(path, resume, kill_at, event_seconds))
    process.start()
    return process


def _run(path: Path, resume: bool, kill_at: int, event_seconds: float) -> None:
    seen = 0

    def on_event(event: dict[str, Any]) -> None:
        nonlocal seen
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
        time.sleep(event_seconds)

    run(path, config(), resume=resume, on_event=on_event)


def _exit_code(process: BaseProcess) -> int | None:
    process.join(60)
    return process.exitcode


def _lasting(path: Path) -> list[dict[str, Any]]:
    """What must be equal however often a run was killed: not seconds, bytes or memory, nor the resumes themselves."""
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    passing = ("seconds", "cpu_seconds", "bytes_sent", "bytes_down", "bytes_up", "peak_rss_bytes")
    kept = [{name: value for name, value in event.items() if name not in passing} for event in events]
    return [event for event in kept if event["event"] not in ("resume", "memory")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    run(path, config())
    return path


def _assert_equal_runs(path: Path, uninterrupted: Path) -> None:
    assert (path / "adapters.safetensors").read_bytes() == (uninterrupted / "adapters.safetensors").read_bytes()
    assert _lasting(path) == _lasting(uninterrupted)
    assert _lasting(path)[-1]["event"] == "eval"


# Events are: phase, 16 or fewer profile steps, profile, memory, then round and memory (and eval) round by round. A kill
# at a `round` event falls between the metrics line and the saved state.
@pytest.mark.parametrize("event", [0, 3, 7, 8, 9, 10, 13, 14, 19, 33])
def test_a_run_killed_at_any_event_ends_with_the_same_bits(tmp_path: Path, uninterrupted: Path, event: int) -> None:
    path = tmp_path / "run"
    assert _exit_code(_start(path, kill_at=event)) == -signal.SIGKILL
    run(path, config(), resume=True)
    _assert_equal_runs(path, uninterrupted)


def test_a_run_killed_at_random_moments_again_and_again_ends_with_the_same_bits(
    tmp_path: Path, uninterrupted: Path
) -> None:
    path, generator = tmp_path / "run", random.Random(7)
    kills = 0
    for attempt in range(4):
        process = _start(path, resume=attempt > 0, event_seconds=0.02)
        while not (path / "state").is_dir():
            time.sleep(0.001)
        time.sleep(0.3 * generator.random())
        process.kill()
        kills += _exit_code(process) == -signal.SIGKILL
    assert kills >= 2
    assert _exit_code(_start(path, resume=True)) == 0
    _assert_equal_runs(path, uninterrupted)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = run(path, config())
    before = (path / "metrics.jsonl").read_bytes()
    second = run(path, config(), resume=True)
    assert (path / "metrics.jsonl").read_bytes() == before
    assert second.evaluation == first.evaluation and second.rounds == first.rounds


def test_a_finished_run_goes_on_when_it_is_given_another_sweep(tmp_path: Path) -> None:
    same = {"lr_decay": "none", "refit_rounds": 0}  # the others depend on how many rounds there are
    start_layer = run(tmp_path / "more", config(**same)).start_layer
    assert start_layer is not None
    rounds = 12 + SHAPE.num_layers - config().window - start_layer + 1
    run(tmp_path / "more", config(rounds=rounds, **same), resume=True)
    run(tmp_path / "at-once", config(rounds=rounds, **same))
    more, _ = read_adapters(tmp_path / "more")
    at_once, _ = read_adapters(tmp_path / "at-once")
    assert all(more[key].tobytes() == at_once[key].tobytes() for key in at_once)


def _states(path: Path) -> list[Path]:
    return sorted((path / "state").glob("state-*.safetensors"))


def _stopped_run(path: Path) -> Path:
    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "memory" and event["round"] == 6:
            raise Stop

    with pytest.raises(Stop):
        run(path, config(), on_event=stop)
    return path


@pytest.mark.parametrize("damage", ["truncated", "empty", "a bit", "no metadata"])
def test_a_damaged_state_is_noticed_and_the_one_before_serves(tmp_path: Path, uninterrupted: Path, damage: str) -> None:
    path = _stopped_run(tmp_path / "run")
    assert len(_states(path)) == 2
    _damage(_states(path)[-1], damage)
    run(path, config(), resume=True)
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    (resumed,) = [event for event in events if event["event"] == "resume"]
    assert len(resumed["skipped_states"]) == 1 and resumed["round"] == 5
    _assert_equal_runs(path, uninterrupted)


def _damage(file: Path, damage: str) -> None:
    content = bytearray(file.read_bytes())
    match damage:
        case "truncated":
            file.write_bytes(content[: len(content) // 2])
        case "empty":
            file.write_bytes(b"")
        case "a bit":
            content[-1] ^= 1
            file.write_bytes(content)
        case "no metadata":
            file.write_bytes((2).to_bytes(8, "little") + b"{}")


def test_when_no_state_is_whole_the_error_names_the_files(tmp_path: Path) -> None:
    path = _stopped_run(tmp_path / "run")
    for file in _states(path):
        _damage(file, "truncated")
    with pytest.raises(CorruptFile, match=r"no state is whole.*state-0"):
        run(path, config(), resume=True)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_stand_ins_that_are_damaged_or_gone_are_noticed(tmp_path: Path, damage: str) -> None:
    path = _stopped_run(tmp_path / "run")
    file = sorted((path / "state").glob("stand_in-*.safetensors"))[0]
    file.unlink() if damage == "missing" else _damage(file, damage)
    with pytest.raises(CorruptFile, match="stand_in"):
        run(path, config(), resume=True)


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    path = _stopped_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="lr was"):
        run(path, config(lr=0.2), resume=True)


def test_a_metrics_line_cut_short_is_dropped(tmp_path: Path, uninterrupted: Path) -> None:
    path = _stopped_run(tmp_path / "run")
    with open(path / "metrics.jsonl", "ab") as stream:
        stream.write(b'{"event": "round", "rou')
    run(path, config(), resume=True)
    _assert_equal_runs(path, uninterrupted)


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no run to resume"):
        run(tmp_path / "nothing", config(), resume=True)
