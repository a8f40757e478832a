"""The hard limit that the trial of memory (`make memory-trial`) runs its processes under."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "memory"
UNAVAILABLE = 125
MIB = 1 << 20


def limited(limit: str, *command: str) -> tuple[subprocess.CompletedProcess[str], dict[str, int]]:
    done = subprocess.run(
        [sys.executable, str(BENCH / "hard_limit.py"), limit, *command],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if done.returncode == UNAVAILABLE:
        pytest.skip(done.stderr.strip())
    return done, json.loads(done.stderr.splitlines()[-1])


def test_the_limit_kills_what_takes_more_and_tells_the_peak_of_what_does_not() -> None:
    taking = "import sys; kept = bytearray(int(sys.argv[1]) << 20); kept[::4096] = b'x' * len(kept[::4096])"
    over, _ = limited("64MiB", sys.executable, "-c", taking, "200")
    assert over.returncode == 128 + 9
    done, figures = limited("128MiB", sys.executable, "-c", taking, "60")
    assert done.returncode == 0
    assert 60 * MIB < figures["peak_bytes"] < 100 * MIB
