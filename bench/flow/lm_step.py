"""One optimizer step on the same batch: the cached window against what trains through the whole model.

    python bench/flow/lm_step.py STORE window        ours: Q layers, boundary from the cache, both branches of the loss
    python bench/flow/lm_step.py STORE lora          peft: rank 8 on q and v of every layer, f32, end to end
    python bench/flow/lm_step.py STORE qlora         the same on bitsandbytes' NF4 layers, built one by one
    python bench/flow/lm_step.py STORE adapters      encoders: a bottleneck adapter after every layer, f32, end to end

One side a process, so that peaks do not mix. The LoRA side has the store's architecture with random weights: neither
its speed nor its memory depends on them. Every token but the first of each sequence carries a label; adapters above the
window are trained (non-zero), so the head sees two branches. With --text the tokens are those of a file and the
stand-in is fitted on it, else random: how much of the head's gradient can be left out depends on both. Prints one JSON
line: tokens a second (median step) and the peak resident set above the imports, the weights included. Encoders are
trained as classifiers.
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

STAND_IN_BATCHES = 8


def main() -> int:
    parser = argparse.ArgumentParser(description="tokens a second and peak memory of one training step")
    parser.add_argument("store")
    parser.add_argument("side", choices=("window", "lora", "qlora", "adapters"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--start", type=int, help="first layer of the window (default: the middle)")
    parser.add_argument("--slots", type=int, help="files of the store in memory at a time (default: all)")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--text", help="a text file for the tokens, which the store's tokenizer splits (causal LMs)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    sides = {"window": _window, "lora": _lora, "qlora": _lora, "adapters": _adapters}
    print(json.dumps({"side": options.side, **sides[options.side](options)}))
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

    from chainfed_engine import native, stand_in
    from chainfed_engine.config import ChainConfig
    from chainfed_engine.memory.meter import reset_peak_rss, rss_bytes
    from chainfed_engine.model.format import StoreInfo
    from chainfed_engine.model.frozen import FrozenModel
    from chainfed_engine.model.store import LayerStore
    from chainfed_engine.step import StageTrainer
    from chainfed_engine.types import Stage, Window, stand_in_key

    torch.set_num_threads(options.threads)
    native.set_num_threads(options.threads)
    import chainfed_engine.model.families as families

    families.family(StoreInfo.read(options.store).architecture)  # imports the library's modelling code
    reset_peak_rss()
    before = rss_bytes()
    model = FrozenModel(LayerStore.open(Path(options.store), num_slots=options.slots, verify=False))
    causal = model.head is not None
    task: Any = "causal-lm" if causal else "classification"
    config = ChainConfig(window=options.window)
    trainer = StageTrainer(model, config, task=task, num_labels=0 if causal else 4, cache_format="int8")
    start = model.num_layers // 2 if options.start is None else options.start
    window = Window(start, start + options.window)
    width = model.shape.hidden_size
    generator = np.random.default_rng(0)
    arrays = trainer.parameters.export()
    for key, value in arrays.items():
        if key.endswith("up_weight"):
            arrays[key] = (1e-3 * generator.normal(size=value.shape)).astype(np.float32)
    batch, *others = _batches(options, model.shape.vocab_size, causal)
    if others:
        arrays |= stand_in.solve(trainer.profile([batch, *others], arrays, depths=[window.stop], with_scores=False))
        native.trim_heap()
        reset_peak_rss()  # the step's peak is asked for; the fit is another phase
    else:
        arrays[stand_in_key(window.stop, "weight")] = np.eye(width, dtype=np.float32)
        arrays[stand_in_key(window.stop, "bias")] = np.zeros(width, np.float32)
    with tempfile.TemporaryDirectory() as cache:
        trainer.begin(Stage("window", window, 1), arrays, cache_dir=Path(cache), lr=1e-3)
        trainer.prepare([batch])
        figures = _measure(lambda: trainer.step(batch), options, before)
        trainer.end()
    return {**figures, "window": [window.start, window.stop], "slots": options.slots}


def _batches(options: argparse.Namespace, vocab_size: int, causal: bool) -> Any:
    """The step's batch; of a text, those after it too, for the stand-in."""
    import torch

    from chainfed_engine.types import Batch

    shape = (options.batch, options.tokens)
    if options.text is None:
        rows = torch.randint(0, vocab_size, (1, *shape), generator=torch.Generator().manual_seed(0))
    else:
        from chainfed_engine.data.tokenizer import Tokenizer

        text = Path(options.text).read_text(encoding="utf-8")[: 8 * STAND_IN_BATCHES * options.batch * options.tokens]
        ids = next(Tokenizer.load(options.store).encode([text], len(text)))
        count = min(len(ids) // (options.batch * options.tokens), STAND_IN_BATCHES)
        if count < 2:
            raise SystemExit(f"{options.text}: expected at least {2 * options.batch * options.tokens} tokens")
        rows = torch.as_tensor(ids[: count * options.batch * options.tokens]).long().view(count, *shape)
    names = [f"sample-{index}" for index in range(options.batch)]
    labels = torch.arange(options.batch) % 4
    return [Batch(ids, torch.ones_like(ids), ids.clone() if causal else labels, names) for ids in rows]


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
    quantised = options.side == "qlora"
    if quantised:
        import bitsandbytes  # noqa: F401 (its memory is an import's)
    base = (
        _four_bit(config) if quantised else transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    )
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


def _four_bit(config: Any) -> Any:
    """The model with random NF4 layers. A layer's weights exist in f32 only until they are quantised."""
    import bitsandbytes
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    inside = [(name, module) for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name, linear in inside:
        weight = torch.empty(linear.out_features, linear.in_features).normal_(0, 0.02)
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        packed.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        model.model.set_submodule(name, packed.to("cpu"))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, last = name.rpartition(".")
            value = torch.empty(parameter.shape).normal_(0, 0.02)
            setattr(model.get_submodule(owner), last, torch.nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(name, type(module)(config).get_buffer(name), persistent=False)
    return model


def _adapters(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    from chainfed_engine.adapters import Bottleneck
    from chainfed_engine.memory.meter import reset_peak_rss, rss_bytes
    from chainfed_engine.model.format import StoreInfo

    torch.set_num_threads(options.threads)
    info = StoreInfo.read(options.store)
    values = {key: value for key, value in info.config.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(info.architecture, **values, num_labels=4)
    transformers.AutoModelForSequenceClassification._model_mapping[type(config)]  # imports the modelling code
    reset_peak_rss()
    before = rss_bytes()
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    adapters = torch.nn.ModuleList()
    for layer in model.bert.encoder.layer:
        adapters.append(Bottleneck(config.hidden_size, 16))
        layer.output.register_forward_hook(lambda module, given, output, adapter=adapters[-1]: adapter(output))
    model.train()
    trained = [value for value in [*model.parameters(), *adapters.parameters()] if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids = torch.randint(0, info.shape.vocab_size, (options.batch, options.tokens))
    labels = torch.arange(options.batch) % 4

    def step() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _measure(step, options, before)


if __name__ == "__main__":
    sys.exit(main())
