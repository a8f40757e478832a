"""Peak memory and tokens a second of one training step: ours against LoRA and QLoRA, every side in its own process.

    python bench/memory/compare.py [--shapes smollm2-135m ...] [--sides window lora qlora] [--repeats 3] [--folder DIR]

Sides take turns, so that a busy minute hits all alike; medians of the repeats. Causal LMs: 4 x 128 tokens, every token
labelled, later adapters trained (both branches of the loss). bert-large: classification, 16 x 128, against bottleneck
adapters in every layer, end to end. Peaks are above the imports, weights included. Prints one JSON line a process and
then a table with our ratio to each side, and of our own peak to what a streamed step needs by arithmetic alone
(`floor_bytes`; give --slots to compare like with like). A side that cannot run here says why and is left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEP = Path(__file__).parents[1] / "flow" / "lm_step.py"
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description="peak memory and speed against LoRA and QLoRA")
    parser.add_argument("--shapes", nargs="*", default=["smollm2-135m", "llama-3.2-1b", "bert-large"])
    parser.add_argument("--sides", nargs="*", default=["window", "lora", "qlora", "adapters"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slots", type=int, help="files of the store in memory at a time (default: all)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", help="where stores go and stay (default: a temporary folder)")
    parser.add_argument("--text", help="a text file for the tokens of causal LMs (default: random tokens)")
    parser.add_argument(
        "--source", help="convert this checkpoint, GGUF file or hub id for the first shape (default: random weights)"
    )
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="chainfed-compare-") as temporary:
        for index, shape in enumerate(options.shapes):
            source = options.source if index == 0 else None
            lines += compare(
                options, shape, Path(options.folder or temporary) / (f"{shape}-real" if source else shape), source
            )
    print_table(lines)
    return 0


def compare(options: argparse.Namespace, shape: str, store: Path, source: str | None) -> list[dict[str, Any]]:
    if not (store / "store.json").exists():
        make = ["convert", source] if source else ["synth", "--shape", shape]
        subprocess.run([sys.executable, "-m", "chainfed_engine", *make, str(store)], check=True)
    encoder = shape.startswith("bert")
    possible = ("window", "adapters") if encoder else ("window", "lora", "qlora")
    sizes = ["--batch", "16"] if encoder else ["--batch", "4"]
    sizes += ["--tokens", "128", "--steps", str(options.steps)]
    lines = []
    for _ in range(options.repeats):
        for side in [name for name in options.sides if name in possible]:
            more = ["--slots", str(options.slots)] if options.slots and side == "window" else []
            more += ["--text", options.text] if options.text and side == "window" else []
            command = [sys.executable, str(STEP), str(store), side, *sizes, *more]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                print(f"{shape} {side}: {(done.stderr.splitlines() or ['?'])[-1]}", file=sys.stderr)
                continue
            lines.append({"shape": shape, **json.loads(done.stdout.splitlines()[-1])})
            if side == "window":
                batch, tokens = int(sizes[1]), int(sizes[3])
                lines[-1]["floor_bytes"] = floor_bytes(store, batch * tokens)
            print(json.dumps(lines[-1]), flush=True)
    return lines


def floor_bytes(store: Path, tokens: int, window: int = 2) -> int:
    """What one cached step of `tokens` tokens holds at the least, its layers streamed: two layers' files, the window's
    inputs, one layer's activations when it is run again, adapters with their optimizer, a shard of the head, and
    records of the cache being read and written. Counted in f32 and int8 records; no interpreter."""
    from chainfed_engine.config import ChainConfig
    from chainfed_engine.federation.session import store_sizes
    from chainfed_engine.memory.parts import Request, adapter_floats, saved_floats
    from chainfed_engine.model.format import StoreInfo
    from chainfed_engine.native import record_bytes

    info = StoreInfo.read(store)
    shape, config = info.shape, ChainConfig()
    layer = max(file.file_bytes for file in info.layers)
    tile = max((file.file_bytes for file in info.head_shards), default=0)
    request = Request(shape, store_sizes(info), config, "causal-lm" if tile else "classification", 0)
    width = shape.hidden_size
    activations = tokens * ((window + 1) * width + saved_floats(shape) + 2 * width)
    records = 2 * tokens * record_bytes("int8", width)
    return 2 * layer + 4 * activations + 16 * window * adapter_floats(request) + tile + records


def print_table(lines: list[dict[str, Any]]) -> None:
    """Medians by shape and side; how many times as fast the window is, and on what part of the memory."""
    print(f"{'shape':<14} {'side':<9} {'tokens/s':>9} {'peak MiB':>9} {'x as fast':>10} {'1/memory':>9} {'x floor':>8}")
    for shape in dict.fromkeys(line["shape"] for line in lines):
        medians = {}
        for side in dict.fromkeys(line["side"] for line in lines if line["shape"] == shape):
            of_side = [line for line in lines if line["shape"] == shape and line["side"] == side]
            medians[side] = (
                statistics.median(line["tokens_per_second"] for line in of_side),
                statistics.median(line["peak_above_import_bytes"] for line in of_side),
            )
        floor = next((line["floor_bytes"] for line in lines if line["shape"] == shape and "floor_bytes" in line), 0)
        for side, (speed, peak) in medians.items():
            ratios = f"{peak / floor:>29.2f}" if side == "window" else ""
            if side != "window" and "window" in medians:
                ratios = f"{medians['window'][0] / speed:>10.1f} {peak / medians['window'][1]:>9.1f}"
            print(f"{shape:<14} {side:<9} {speed:>9.0f} {peak / MIB:>9.0f} {ratios}")


if __name__ == "__main__":
    sys.exit(main())
