"""A site is ended at every change that it makes to its folder, started again, and the run must end with the same bits.

Here two changes, at one of them with half of what was being written; `make kill-sweep` tries all of them both ways.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.federation.deployed import make_files
from tests.federation.kill_points import KILLED

ROOT = Path(__file__).parents[2]
POINTS = ["all"] if os.environ.get("CHAINFED_KILL_SWEEP") == "full" else ["half0.1", "0.6"]


@pytest.mark.timeout(1800)
def test_a_site_killed_while_it_writes_goes_on_and_the_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    make_files(tmp_path, rounds=2)
    command = [sys.executable, "-m", "tests.federation.site_kills", str(tmp_path), str(tmp_path / "work"), *POINTS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    calm, *outcomes = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert calm["codes"] == [0] and calm["adapters"]
    for kept in ("setup.json", "down_weight.int8.npy", ".bin"):
        assert any(kept in name for name in calm["changes"]), f"nothing was written to {kept}"
    assert len(outcomes) == (2 * len(calm["changes"]) if POINTS == ["all"] else len(POINTS))
    for outcome in outcomes:
        where = f"killed at {outcome['at']} of the changes: {outcome['changes']}"
        assert outcome["codes"] == [KILLED, 0], where
        assert outcome["adapters"] == calm["adapters"], where
        assert outcome["leftover"] == [], where
