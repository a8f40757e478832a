"""The trial of the promise: a store of a large shape, fine-tuned and evaluated under a hard memory limit.

    python bench/memory/trial.py --shape llama-3.1-8b --limit 1GiB [--folder DIR] [--keep]
    python bench/memory/trial.py --shape llama-3.1-8b --limit 1GiB --convert [--only convert]

Everything runs in processes of its own under `hard_limit.py`, page cache included: `synth` (unless the store is there),
`run` (start layer by CKA and stand-ins, cache fill, window steps, slides, evaluation) and `eval`. Prints one JSON line
a process and a verdict; exit code 1 if one did not come to its end. Disk: 5.5 GB for the 8B shape. With `--convert` the
store comes from `convert` of a random bf16 checkpoint (`checkpoint.py`, outside the limit): 16 GB more.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from checkpoint import write_checkpoint

HARD_LIMIT = Path(__file__).with_name("hard_limit.py")
CONFIG = """[model]
store = {store}
[data]
train = {train}
eval = {eval}
prompt = "prompt"
response = "response"
num_clients = 2
[chain]
window = {window}
start_layer = "auto"
stand_in = {stand_in}
rounds = {rounds}
[train]
batch_size = {batch}
sequence_length = {tokens}
max_local_steps = {steps}
[memory]
budget = "{budget}"
[federation]
clients_per_round = 1
profile_clients = 2
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="fine-tune a large shape under a hard memory limit")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--limit", default="1GiB")
    parser.add_argument("--budget", help="what the run is told (default: the limit)")
    parser.add_argument("--folder", help="where store and runs go (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave the store for the next trial")
    parser.add_argument("--convert", action="store_true", help="make the store from a checkpoint")
    parser.add_argument("--only", choices=("synth", "convert", "run", "eval"), nargs="*", help="leave the others out")
    parser.add_argument("--window", default="auto", help="layers at once (default: the planner's choice)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--stand-in", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="chainfed-trial-"))
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / f"{Path(options.shape).name}-store"
    checkpoint = folder / f"{Path(options.shape).name}-checkpoint"
    try:
        return trial(options, folder, store, checkpoint)
    finally:
        shutil.rmtree(folder / "run", ignore_errors=True)
        if not options.keep:
            shutil.rmtree(store, ignore_errors=True)
            shutil.rmtree(checkpoint, ignore_errors=True)
            if options.folder is None:
                shutil.rmtree(folder, ignore_errors=True)


def trial(options: argparse.Namespace, folder: Path, store: Path, checkpoint: Path) -> int:
    shutil.rmtree(folder / "run", ignore_errors=True)
    train, held_out = folder / "train.jsonl", folder / "eval.jsonl"
    write_text_rows(train, 4 * options.batch, seed=0)
    write_text_rows(held_out, options.batch, seed=1)
    names = {"store": json.dumps(str(store)), "train": json.dumps(str(train)), "eval": json.dumps(str(held_out))}
    budget = options.budget or options.limit
    settings = {name: getattr(options, name) for name in ("window", "rounds", "batch", "tokens", "steps")}
    settings["window"] = '"auto"' if options.window == "auto" else int(options.window)
    settings["stand_in"] = str(options.stand_in).lower()
    config = folder / "config.toml"
    config.write_text(CONFIG.format(**names, budget=budget, **settings))
    commands = {
        "run": ["run", str(config), "--out", str(folder / "run")],
        "eval": ["eval", str(folder / "run"), "--data", str(held_out), "--json"],
    }
    if not (store / "store.json").exists():
        if options.convert:
            if not checkpoint.exists():
                write_checkpoint(options.shape, checkpoint, shard_bytes=4 * 10**9)
            commands = {"convert": ["convert", str(checkpoint), str(store)], **commands}
        else:
            commands = {"synth": ["synth", "--shape", options.shape, str(store)], **commands}
    if options.only:
        commands = {name: arguments for name, arguments in commands.items() if name in options.only}
    for name, arguments in commands.items():
        figures = limited(options.limit, arguments)
        if name == "run":
            figures |= last_memory_event(folder / "run")
        print(json.dumps({"command": name, "shape": options.shape, "limit": options.limit, **figures}), flush=True)
        if figures.get("exit_code") != 0:
            print(f"{name} did not come to its end under {options.limit}", file=sys.stderr)
            return 1
    print(f"{options.shape} came to its end under {options.limit}", file=sys.stderr)
    return 0


def limited(limit: str, arguments: list[str]) -> dict[str, object]:
    """Figures of `chainfed ARGUMENTS` under the limit; its own lines go to stderr."""
    command = [sys.executable, str(HARD_LIMIT), limit, sys.executable, "-m", "chainfed_engine", *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    *lines, last = done.stderr.splitlines() or [""]
    for line in lines:
        print(line, file=sys.stderr)
    try:
        figures = json.loads(last)
    except ValueError:
        figures = {"exit_code": done.returncode, "reason": last}
    return dict(figures)


def last_memory_event(run: Path) -> dict[str, object]:
    """The figures the run itself wrote last, the prediction, and what the planner chose."""
    if not (run / "metrics.jsonl").exists():
        return {}
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    memory = next((event for event in reversed(events) if event["event"] == "memory"), {})
    plan = next((event for event in events if event["event"] == "plan"), {})
    figures = {name: value for name, value in memory.items() if name not in ("event", "round", "rounds")}
    return {**figures, "choices": plan.get("choices")}


def write_text_rows(path: Path, count: int, *, seed: int) -> None:
    """Rows of seeded words, longer than any sequence of a trial."""
    words = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def text(length: int) -> str:
        return " ".join("".join(words.choices(letters, k=words.randint(2, 9))) for _ in range(length))

    rows = [json.dumps({"prompt": text(4), "response": text(300)}) for _ in range(count)]
    path.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    sys.exit(main())
