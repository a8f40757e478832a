"""A site is ended at every change that it makes to its folder, started again, and the run must end with the same bits.

Here a few changes, with what was being written cut in half at some; `make kill-sweep` tries all of them both ways.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.federation.deployed import make_files

ROOT = Path(__file__).parents[2]
FULL = os.environ.get("CHAINFED_KILL_SWEEP") == "full"


def _run(root: Path, work: Path, *points: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.federation.site_kills", str(root), str(work), *points]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


@pytest.mark.timeout(1800)
def test_a_site_killed_while_it_writes_goes_on_and_the_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    make_files(tmp_path, rounds=2)
    (tmp_path / "calm").mkdir()
    _run(tmp_path, tmp_path / "calm")
    changes = json.loads((tmp_path / "calm" / "changes.json").read_text())
    for kept in ("setup.json", "down_weight.npy", ".bin"):
        assert any(kept in name for name in changes), f"nothing was written to {kept}: {changes}"
    whole = hashlib.sha256((tmp_path / "calm" / "run" / "adapters.safetensors").read_bytes()).hexdigest()
    renames = [number for number, name in enumerate(changes) if name.startswith("os.rename")]
    some = [renames[0], renames[len(renames) // 2]]
    plain, half = (range(len(changes)), range(len(changes))) if FULL else (some[1:], some[:1])
    outcomes = _run(tmp_path, tmp_path / "killed", *map(str, plain), *(f"half{number}" for number in half))
    assert len(outcomes) == len(plain) + len(half)
    for outcome in outcomes:
        where = f"killed at {outcome['at']}: {changes[int(outcome['at'].removeprefix('half'))]}"
        assert outcome["codes"] == [77, 0], where
        assert outcome["adapters"] == whole, where
        assert outcome["leftover"] == [], where
