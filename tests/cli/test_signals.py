"""Ctrl-C and SIGTERM in the middle of a round of the real program: exit code, message, and a run that goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chainfed_engine.model.synth import synth
from tests.small_bert import SMALL_BERT

CONFIG = """
[model]
store = "store"
[data]
train = "train.csv"
label = "label"
hold_out = 0.1
num_clients = 2
[chain]
rounds = 3
window = 1
start_layer = 1
adapter_size = 4
probe_rounds = 0
[train]
batch_size = 2
sequence_length = 16
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    synth(SMALL_BERT, tmp_path / "store", "int4")
    rows = [f"{'good' if row % 3 else 'bad'} film number {row},{row % 2}" for row in range(120)]
    (tmp_path / "train.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path


def started(out: str, *, resume: bool = False) -> "subprocess.Popen[str]":
    """The program in a process of its own: one that tests have begun has oneDNN's GELU, and so other last bits."""
    command = [sys.executable, "-m", "chainfed_engine", "run", "run.toml", "--out", out]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [*command, "--resume"] if resume else command,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Whoever started the tests in the background may have had Ctrl-C ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def cut_off(ending: signal.Signals, *, rounds: int, resume: bool) -> tuple[int, list[str]]:
    """Start the program, send `ending` while the round after `rounds` is under way: exit code, lines of stderr."""
    process = started("cut", resume=resume)
    try:
        deadline = time.monotonic() + 240
        while process.poll() is None and num_rounds(Path("cut")) < rounds and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        process.send_signal(ending)
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return process.returncode, errors.splitlines()


def num_rounds(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count('"event": "round"') if metrics.exists() else 0


def figures(run: Path) -> list[str]:
    """Losses and scores, without seconds, bytes and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [f"{line['event']} {line['round']} {line.get('loss')} {line.get('accuracy')}" for line in lines]


def finished(process: "subprocess.Popen[str]") -> int:
    process.communicate(timeout=240)
    return process.returncode


def test_a_run_that_was_interrupted_and_terminated_ends_like_one_that_was_not(folder: Path) -> None:
    assert finished(started("whole")) == 0
    kept = "chainfed: cut keeps the rounds that are done; the same command with --resume goes on from there"
    code, lines = cut_off(signal.SIGINT, rounds=1, resume=False)
    assert (code, lines[-2:]) == (130, [kept, "chainfed: interrupted"]), lines
    code, lines = cut_off(signal.SIGTERM, rounds=2, resume=True)
    assert (code, lines[-2:]) == (143, [kept, "chainfed: terminated"]), lines
    assert any(line.startswith("resumed after round ") for line in lines)
    assert finished(started("cut", resume=True)) == 0
    whole, cut = (Path(name, "adapters.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    rounds = [line for line in figures(Path("cut")) if line.startswith(("round ", "eval "))]
    assert rounds == [line for line in figures(Path("whole")) if line.startswith(("round ", "eval "))]
