"""The promise under a hard limit of the kernel: a small model streamed, fine-tuned and evaluated inside it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "memory"
UNAVAILABLE = 125
MIB = 1 << 20
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 6,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


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


def test_a_streamed_run_and_its_evaluation_come_to_their_end_under_the_limit(tmp_path: Path) -> None:
    limited("64MiB", "true")  # skips where no group can be made
    (tmp_path / "tiny.json").write_text(json.dumps(SHAPE))
    command = [sys.executable, str(BENCH / "trial.py"), "--shape", str(tmp_path / "tiny.json"), "--limit", "480MiB"]
    command += ["--folder", str(tmp_path), "--tokens", "64", "--rounds", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    figures = {line["command"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert set(figures) == {"synth", "run", "eval"}
    for line in figures.values():
        assert line["peak_bytes"] <= 480 * MIB
    assert figures["run"]["peak_rss_bytes"] <= figures["run"]["predicted_peak_bytes"] <= 480 * MIB
