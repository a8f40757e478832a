"""A start-up that takes more than the run will, as importing PyTorch's CUDA build does, is in the plan, and a budget
below it is refused: the measured peak is the process's, whatever took it."""

import json
import subprocess
import sys
from pathlib import Path

from chainfed_engine.model.synth import synth
from tests.memory.test_faults import CONFIG, SHAPE

MIB = 1 << 20

# argv: MiB that are taken and given back before the program goes on, then the program's own arguments.
PROGRAM = """
import mmap, sys
from chainfed_engine.cli.main import main, prepare_process
prepare_process()
with mmap.mmap(-1, int(sys.argv[1]) << 20) as block:
    for page in range(0, len(block), 4096):
        block[page] = 1
sys.exit(main(sys.argv[2:]))
"""


def program(folder: Path, start_up_mib: int, out: str, budget: str) -> subprocess.CompletedProcess[str]:
    command = ["run", "run.toml", "--out", out, "--set", f"memory.budget={budget}", "--set", "chain.rounds=1"]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(start_up_mib), *command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_prediction_is_no_less_than_a_start_up_that_takes_more_than_the_run(tmp_path: Path) -> None:
    synth(SHAPE, tmp_path / "store", "int4")
    rows = [{"prompt": f"question {index}", "response": "an answer of some length " * 2} for index in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "run.toml").write_text(CONFIG)

    refused = program(tmp_path, 1000, "refused", "900MiB")
    assert refused.returncode == 2 and "importing PyTorch and reading the data took" in refused.stderr, refused.stderr
    assert not (tmp_path / "refused").exists()

    done = program(tmp_path, 1000, "out", "1200MiB")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    plan = next(event for event in events if event["event"] == "plan")
    peak = max(event["peak_rss_bytes"] for event in events if event["event"] == "memory")
    assert plan["parts"]["start-up, beyond all of this"] > 0
    assert 1000 * MIB < peak <= plan["predicted_peak_bytes"]
    assert plan["predicted_peak_bytes"] < 1050 * MIB  # the start-up itself, nothing on top of it
