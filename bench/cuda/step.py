"""A window step of the 8B shape on the device: two layers of four, 4 x 512 tokens, head of 128,256 rows.

    python bench/cuda/step.py --out results.jsonl [--tokens 512] [--batch 4]

Needs transformers; without it one line says so. Beside the time stands the limit of the work (layers run again in
backward), T* = M (6 Q n + 6 n_a + 4 d V + 9 Q T d) / P with P torch's best bf16 rate here, and the peak of torch's
allocator, which holds weights, activations and workspaces. M tokens, Q layers, n weights a layer, n_a adapter weights,
d width, V vocabulary, T length.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

WINDOW, LAYERS, WIDTH, INNER, VOCABULARY, ADAPTER = 2, 4, 4096, 14336, 128256, 64
CONFIG = {
    "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
DEVICE, SQUARE = "cuda", 8192
_WEIGHTS = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 4 + 3 * WIDTH * INNER  # of a layer


def best_flop_per_s() -> float:
    square = torch.randn(SQUARE, SQUARE, device=DEVICE, dtype=torch.bfloat16)
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        square @ square
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(2 * SQUARE**3 / statistics.median(times[1:]))


def step(batch_size: int, length: int) -> dict[str, Any]:
    from chainfed_engine.config import ChainConfig
    from chainfed_engine.model.frozen import FrozenModel
    from chainfed_engine.model.place import find_place
    from chainfed_engine.model.store import LayerStore
    from chainfed_engine.model.synth import synth
    from chainfed_engine.step import StageTrainer
    from chainfed_engine.types import Batch, Stage, Window

    rate = best_flop_per_s()
    torch.cuda.empty_cache()
    config = ChainConfig(
        window=WINDOW, adapter_size=ADAPTER, stand_in=False, auxiliary_weight=0.0, device=DEVICE, sequence_length=length
    )
    ids = torch.randint(0, VOCABULARY, (batch_size, length), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.ones_like(ids), ids, [str(row) for row in range(batch_size)])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        store = LayerStore.open(
            synth(str(Path(folder) / "config.json"), Path(folder) / "store"), place=find_place(DEVICE)
        )
        trainer = StageTrainer(FrozenModel(store), config, task="causal-lm", cache_format="int8", recompute=True)
        stage = Stage("window", Window(LAYERS - WINDOW, LAYERS), 0)
        settings = {"start_layer": LAYERS - WINDOW}
        trainer.begin(stage, trainer.parameters.export(), cache_dir=Path(folder) / "cache", lr=1e-3, settings=settings)
        trainer.prepare([batch])
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(6):
            torch.cuda.synchronize()
            started = time.perf_counter()
            trainer.step(batch)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_reserved()
        trainer.end()
        store.close()
    tokens, adapters = batch_size * length, WINDOW * 2 * WIDTH * ADAPTER
    work = tokens * (6 * WINDOW * _WEIGHTS + 6 * adapters + 4 * WIDTH * VOCABULARY + 9 * WINDOW * length * WIDTH)
    median = statistics.median(seconds[1:])
    return {
        "tokens": tokens, "step_ms": 1e3 * median, "limit_ms": 1e3 * work / rate, "of_limit": work / rate / median,
        "peak_reserved_bytes": peak, "recompute": True,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    row: dict[str, Any] = {"kind": "step", "what": "window step of the 8B shape"}
    status = 0
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError:
        row["left_out"] = "transformers is not installed"
    else:
        try:
            row |= step(options.batch, options.tokens)
        except Exception as problem:  # the file is wanted with whatever was learnt
            row["problem"], status = f"{type(problem).__name__}: {problem}", 1
    with options.out.open("a") as out:
        print(json.dumps(row), file=out)
    return status


if __name__ == "__main__":
    sys.exit(main())
