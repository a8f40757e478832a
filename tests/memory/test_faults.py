"""What goes wrong below a run: a full cache disk, a budget lowered between runs, a kill while layers stream."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chainfed_engine import api
from chainfed_engine.boundary import BoundaryCache
from chainfed_engine.cli.main import main
from chainfed_engine.config_file import load_config
from chainfed_engine.errors import InconsistentUpdates, MemoryBudgetExceeded, StorageError
from chainfed_engine.federation import inputs, read_adapters
from chainfed_engine.memory.plan import Plan
from chainfed_engine.model.synth import synth

MIB = 1 << 20
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
CONFIG = """
[model]
store = "store"
[data]
train = "train.jsonl"
response = "response"
num_clients = 2
[chain]
rounds = 4
window = 1
start_layer = 1
stand_in = false
adapter_size = 4
[train]
batch_size = 2
sequence_length = 32
[memory]
cache_format = "f32"
[federation]
clients_per_round = 2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store, data and configuration; the working directory."""
    synth(SHAPE, tmp_path / "store", "int4")
    rows = [{"prompt": f"question {index}", "response": "an answer of some length " * 2} for index in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "run.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def small_disk(path: Path, num_bytes: int) -> Iterator[None]:
    """A file system of its own at `path`; skips where it cannot be mounted."""
    path.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_under_the_cache_tells_bytes_needed_and_free_and_keeps_what_was_sealed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "cache", 64 << 10):
        key, format_ = "key", {"cache_format": "f32", "hidden_size": 256}
        with BoundaryCache.create(tmp_path / "cache", 1, key, **format_) as cache:  # type: ignore[arg-type]
            records = torch.arange(8 * cache.record_bytes).to(torch.uint8).reshape(8, -1)
            cache.append(["a"], [8], records)
            cache.seal()
            many = torch.zeros(100, cache.record_bytes, dtype=torch.uint8)
            with pytest.raises(StorageError, match=rf"No space left.*writing {many.nbytes} bytes, \d+ bytes free"):
                cache.append(["b"], [100], many)
        again = BoundaryCache.open(tmp_path / "cache", 1, key, **format_)  # type: ignore[arg-type]
        assert again is not None and "b" not in again
        found = again.read(["a"])
        assert found is not None and torch.equal(found[0], records)
        again.close()


def test_a_run_whose_cache_disk_was_full_is_taken_up_once_there_is_room(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(folder / "out" / "cache", 16 << 10):
        assert main(["run", "run.toml", "--out", "out"]) == 2
        message = capfd.readouterr().err
        assert "No space left" in message and "bytes free" in message
    assert main(["run", "run.toml", "--out", "out", "--resume"]) == 0
    assert read_adapters(folder / "out")[1]["rounds"] == 4


def test_a_budget_lowered_between_runs_is_refused_before_anything_changes_or_kept(folder: Path) -> None:
    def stop(event: object) -> None:
        if isinstance(event, dict) and event["event"] == "round" and event["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.run(load_config("run.toml"), Path("out"), on_event=stop)
    before = {path.name: path.read_bytes() for path in Path("out").iterdir() if path.is_file()}
    with pytest.raises(MemoryBudgetExceeded, match=r"the smallest that would do is (\d+) bytes") as refusal:
        api.run(load_config("run.toml", ["memory.budget=64MiB"]), Path("out"), resume=True)
    assert before == {path.name: path.read_bytes() for path in Path("out").iterdir() if path.is_file()}
    smallest = int(str(refusal.value).split("would do is ")[1].split()[0])
    lower = load_config("run.toml", [f"memory.budget={smallest + 16 * MIB}"])
    result = api.run(lower, Path("out"), resume=True)
    assert all(np.isfinite(array).all() for array in result.parameters.values())
    assert read_adapters("out")[1]["rounds"] == 4


def test_layers_cut_while_they_stream_stop_the_run_by_their_name_and_whole_ones_let_it_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = inputs.plan_for

    def one_slot(*arguments: Any, **named: Any) -> Plan:
        plan = planned(*arguments, **named)
        return replace(plan, choices=replace(plan.choices, num_slots=1))

    monkeypatch.setattr(inputs, "plan_for", one_slot)
    whole = {path: path.read_bytes() for path in Path("store").glob("layer-*")}
    config = load_config("run.toml", ["chain.rounds=8"])

    def cut(event: object) -> None:
        if isinstance(event, dict) and event["event"] == "round" and event["round"] == 1:
            for path, data in whole.items():
                os.truncate(path, len(data) // 2)

    with pytest.raises(InconsistentUpdates, match=r"layer-000\d.*ends at byte \d+, but data up to byte \d+"):
        api.run(config, Path("out"), on_event=cut)
    for path, data in whole.items():
        path.write_bytes(data)
    result = api.run(config, Path("out"), resume=True)
    assert [event["accepted"] for event in result.events if event["event"] == "round"] == [True] * 3
    assert read_adapters("out")[1]["rounds"] == 8


def test_a_kill_while_layers_stream_leaves_a_run_that_can_be_taken_up(folder: Path) -> None:
    command = [sys.executable, "-m", "chainfed_engine", "run", "run.toml", "--out", "out"]
    command += ["--set", "chain.rounds=400", "--set", "memory.cache_format=int8"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        metrics, deadline = folder / "out" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count('"event": "round"') >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    finished = [
        json.loads(line)["round"] for line in metrics.read_text().splitlines() if line.startswith('{"event": "round"')
    ]
    seen: list[int] = []

    def stop(event: object) -> None:
        if isinstance(event, dict) and event["event"] == "round":
            seen.append(event["round"])
            raise KeyboardInterrupt

    overrides = ["chain.rounds=400", "memory.cache_format=int8"]
    with pytest.raises(KeyboardInterrupt):
        api.run(load_config("run.toml", overrides), Path("out"), resume=True, on_event=stop)
    assert seen[0] in (finished[-1], finished[-1] + 1)  # at most the round it fell in was lost
