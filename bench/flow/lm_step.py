"""One optimizer step of a causal LM on the same batch: the cached window against LoRA through the whole model.

    python bench/flow/lm_step.py STORE window        ours: Q layers, boundary from the cache, both branches of the loss
    python bench/flow/lm_step.py STORE lora          peft: rank 8 on q and v of every layer, f32, end to end

One side a process, so that peaks do not mix. The LoRA side has the store's architecture with random weights: neither
its speed nor its memory depends on them. Every token but the first of each sequence carries a label; adapters above the
window are trained (non-zero), so the head sees two branches. Prints one JSON line: tokens a second (median step) and
the peak resident set above the imports, the weights included.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chainfed_engine.cli.main import prepare_process


def main() -> int:
    parser = argparse.ArgumentParser(description="tokens a second and peak memory of one training step")
    parser.add_argument("store")
    parser.add_argument("side", choices=("window", "lora"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--start", type=int, help="first layer of the window (default: the middle)")
    parser.add_argument("--slots", type=int, help="files of the store in memory at a time (default: all)")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    side = _window if options.side == "window" else _lora
    print(json.dumps({"side": options.side, **side(options)}))
    return 0


def _measure(step: Callable[[], object], options: argparse.Namespace, rss_before: int) -> dict[str, Any]:
    from chainfed_engine.memory.meter import peak_rss_bytes

    step()  # buffers and caches of a first step are part of the peak, not of the time
    seconds = []
    for _ in range(options.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return {
        "tokens_per_second": round(options.batch * options.tokens / median, 1),
        "best_seconds": round(min(seconds), 4),
        "median_seconds": round(median, 4),
        "peak_above_import_bytes": peak_rss_bytes() - rss_before,
        "import_bytes": rss_before,
        "threads": options.threads,
    }


def _window(options: argparse.Namespace) -> dict[str, Any]:
    prepare_process()
    import numpy as np
    import torch

    from chainfed_engine import native
    from chainfed_engine.config import ChainConfig
    from chainfed_engine.memory.meter import reset_peak_rss, rss_bytes
    from chainfed_engine.model.format import StoreInfo
    from chainfed_engine.model.frozen import FrozenModel
    from chainfed_engine.model.store import LayerStore
    from chainfed_engine.step import StageTrainer
    from chainfed_engine.types import Batch, Stage, Window, stand_in_key

    torch.set_num_threads(options.threads)
    native.set_num_threads(options.threads)
    import chainfed_engine.model.families as families

    families.family(StoreInfo.read(options.store).architecture)  # imports the library's modelling code
    reset_peak_rss()
    before = rss_bytes()
    model = FrozenModel(LayerStore.open(Path(options.store), num_slots=options.slots, verify=False))
    trainer = StageTrainer(model, ChainConfig(window=options.window), task="causal-lm", cache_format="int8")
    start = model.num_layers // 2 if options.start is None else options.start
    window = Window(start, start + options.window)
    width = model.shape.hidden_size
    generator = np.random.default_rng(0)
    arrays = trainer.parameters.export()
    for key, value in arrays.items():
        if key.endswith("up_weight"):
            arrays[key] = (1e-3 * generator.normal(size=value.shape)).astype(np.float32)
    arrays[stand_in_key(window.stop, "weight")] = np.eye(width, dtype=np.float32)
    arrays[stand_in_key(window.stop, "bias")] = np.zeros(width, np.float32)
    ids = torch.from_numpy(generator.integers(0, model.shape.vocab_size, (options.batch, options.tokens)))
    names = [f"sample-{index}" for index in range(options.batch)]
    batch = Batch(ids, torch.ones_like(ids), ids.clone(), names)
    with tempfile.TemporaryDirectory() as cache:
        trainer.begin(Stage("window", window, 1), arrays, cache_dir=Path(cache), lr=1e-3)
        trainer.prepare([batch])
        figures = _measure(lambda: trainer.step(batch), options, before)
        trainer.end()
    return {**figures, "window": [window.start, window.stop], "slots": options.slots}


def _lora(options: argparse.Namespace) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    from chainfed_engine.memory.meter import reset_peak_rss, rss_bytes
    from chainfed_engine.model.format import StoreInfo

    torch.set_num_threads(options.threads)
    info = StoreInfo.read(options.store)
    values = {key: value for key, value in info.config.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(info.architecture, **{**values, "use_cache": False})
    transformers.AutoModelForCausalLM._model_mapping[type(config)]  # imports the library's modelling code
    reset_peak_rss()
    before = rss_bytes()
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    model.train()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    ids = torch.randint(0, info.shape.vocab_size, (options.batch, options.tokens))

    def step() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _measure(step, options, before)


if __name__ == "__main__":
    sys.exit(main())
