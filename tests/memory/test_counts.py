"""The planner's counts of a step and of a pass against what torch's allocator was asked for, float by float."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from chainfed_engine import native
from chainfed_engine.config import ChainConfig
from chainfed_engine.memory import parts
from chainfed_engine.memory.parts import Choices, Request, StoreSizes, branches, fill_bytes, live_floats, step_bytes
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.store import LayerStore
from chainfed_engine.model.synth import synth
from chainfed_engine.step import StageTrainer
from chainfed_engine.types import Arrays, Batch, Stage, Window, stand_in_key

SIZES = StoreSizes(1, 1, 1, 1, 4, 1)
SEQUENCES, TOKENS, LAYERS = 4, 128, 4
SHAPES = {
    "bert": {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6},
    "llama": {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2},
    "qwen3": {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4},
}


def open_model(folder: Path, model_type: str, activation: Any = None, **sizes: int) -> FrozenModel:
    config: dict[str, Any] = {"model_type": model_type, "vocab_size": 2000, "max_position_embeddings": TOKENS + 2}
    config |= {"num_hidden_layers": LAYERS, **sizes}
    if "num_key_value_heads" in sizes:
        config |= {"head_dim": 64, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return FrozenModel(LayerStore.open(synth(str(folder / "config.json"), folder / "store")), activation)


def batch_of(lengths: list[int], *, causal: bool) -> Batch:
    ids = torch.randint(5, 250, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = torch.where(mask > 0, ids, -100) if causal else torch.arange(len(lengths)) % 2
    return Batch(ids, mask, labels, [f"sample-{index}" for index in range(len(lengths))])


def peak_floats(run: Callable[[], object]) -> float:
    """Most floats that were allocated at once, beside what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert sizes
    return float(np.cumsum(sizes).max()) / 4


def trained_everywhere(trainer: StageTrainer, window: Window) -> Arrays:
    """Parameters with no adapter at its start, and a map in the stand-in's place."""
    generator, width = np.random.default_rng(0), trainer.model.shape.hidden_size
    arrays = dict(trainer.parameters.export())
    for key, value in arrays.items():
        if key.startswith("adapters"):
            arrays[key] = generator.normal(scale=1e-3, size=value.shape).astype(np.float32)
    if window.stop < LAYERS:
        arrays[stand_in_key(window.stop, "weight")] = np.eye(width, dtype=np.float32)
        arrays[stand_in_key(window.stop, "bias")] = np.zeros(width, np.float32)
    return arrays


@pytest.mark.parametrize("model_type", list(SHAPES))
@pytest.mark.parametrize(
    ("options", "recompute"),
    [
        ({"window": 1}, False),
        ({"window": 1, "pooling": "mean"}, False),  # decoders too: a classifier holds less than an LM's head
        ({"window": 2}, False),
        ({"window": 2}, True),
        ({"window": 2, "adapter": "lora"}, False),
        ({"method": "full-adapters"}, False),
        ({"method": "lora", "adapter": "lora"}, True),
    ],
)
def test_a_step_holds_what_is_counted(
    model_type: str, options: dict[str, Any], recompute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(tmp_path, model_type, **SHAPES[model_type])
    causal = model.head is not None and "pooling" not in options
    config = ChainConfig(batch_size=SEQUENCES, sequence_length=TOKENS, start_layer=1, adapter_size=16, **options)
    request = Request(model.shape, SIZES, config, "causal-lm" if causal else "classification", interpreter_bytes=0)
    trainer = StageTrainer(model, config, task=request.task, num_labels=0 if causal else 2, recompute=recompute)
    start = 0 if request.window_layers == LAYERS else 1
    window = Window(start, start + request.window_layers)
    batch = batch_of([TOKENS] * SEQUENCES, causal=causal)
    trainer.begin(
        Stage("window", window, 0),
        trained_everywhere(trainer, window),
        cache_dir=tmp_path / "cache",
        lr=1e-3,
        settings={"start_layer": 1},
    )
    trainer.prepare([batch])
    trainer.step(batch)  # the optimizer's state and the workspaces, which are counted elsewhere
    measured = peak_floats(lambda: trainer.step(batch))
    if causal and model.head is not None:
        rows = branches(request) * SEQUENCES * (TOKENS - 1)
        head, width = model.head, model.shape.hidden_size
        workspace = native.cross_entropy_workspace_bytes(head.block_format, rows, head.max_shard_rows, width, None)
        assert workspace <= parts.HEAD_WORKSPACE_BYTES
        monkeypatch.setattr(parts, "HEAD_WORKSPACE_BYTES", workspace)
    counted = step_bytes(request, Choices(2, None, SEQUENCES, recompute, "f32", 4 << 20)) / 4
    assert 0.98 <= counted / measured <= (1.12 if options.get("window") == 1 else 1.03)
    trainer.end()
    model.store.close()


def test_adapters_above_a_window_are_counted_for_every_token_that_is_averaged(tmp_path: Path) -> None:
    """A classifier on the mean of the tokens sends all of them through the adapters above."""
    model = open_model(tmp_path, "llama", **SHAPES["llama"], num_hidden_layers=12)
    config = ChainConfig(
        batch_size=SEQUENCES, sequence_length=TOKENS, start_layer=0, adapter_size=16, window=1, pooling="mean"
    )
    request = Request(model.shape, SIZES, config, "classification", interpreter_bytes=0)
    trainer = StageTrainer(model, config, task="classification", num_labels=2)
    window, batch = Window(0, 1), batch_of([TOKENS] * SEQUENCES, causal=False)
    trainer.begin(Stage("window", window, 0), trained_everywhere(trainer, window), cache_dir=None, lr=1e-3)
    trainer.step(batch)
    measured = peak_floats(lambda: trainer.step(batch))
    counted = step_bytes(request, Choices(1, None, SEQUENCES, False, "f32", 4 << 20)) / 4
    trainer.end()
    model.store.close()
    assert 0.98 <= counted / measured <= 1.12


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("bert", {"hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 4}),
        ("bert", {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}),
        ("llama", {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}),
        ("llama", {"hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}),
        ("llama", {"hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}),
        ("qwen3", {"hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}),
    ],
)
def test_a_layer_without_a_graph_holds_what_is_counted(model_type: str, sizes: dict[str, int], tmp_path: Path) -> None:
    model = open_model(tmp_path, model_type, **sizes)
    batch = batch_of([TOKENS] * SEQUENCES, causal=False)
    context = model.context(batch)
    hidden = model.run_layer(0, model.embed(batch), context)
    measured = peak_floats(lambda: model.run_layer(1, hidden, context)) / (SEQUENCES * TOKENS) + sizes["hidden_size"]
    counted = live_floats(model.shape)
    assert measured <= counted + 4  # statistics of a norm
    assert counted <= 1.15 * measured
    model.store.close()


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_passes_hold_a_micro_batch_and_say_the_same(model_type: str, tmp_path: Path) -> None:
    model = open_model(tmp_path, model_type, "f32", **SHAPES[model_type])
    causal = model.head is not None
    task: Any = "causal-lm" if causal else "classification"
    config = ChainConfig(batch_size=SEQUENCES, sequence_length=TOKENS, start_layer=1)
    request = Request(model.shape, SIZES, config, task, interpreter_bytes=0)
    batch, results, peaks = batch_of([TOKENS, 90, 31, 7], causal=causal), [], []
    for micro_batch in (0, 1):
        trainer = StageTrainer(
            model, config, task=task, num_labels=0 if causal else 2, micro_batch=micro_batch, fill_bytes=1
        )
        arrays = trained_everywhere(trainer, Window(1, 3))
        scores = trainer.evaluate([batch], arrays)
        statistics = [trainer.profile([batch], arrays, depths=[2])]
        if not causal:
            statistics.append(trainer.classifier_statistics([batch], arrays)[0])
        results.append((scores, statistics))
        peaks.append(4 * peak_floats(lambda trainer=trainer, arrays=arrays: trainer.evaluate([batch], arrays)))
    assert peaks[1] < 0.5 * peaks[0]
    assert peaks[1] <= fill_bytes(request, Choices(2, 1, 1, False, "f32", 1))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-3)
    for whole, split in zip(results[0][1], results[1][1], strict=True):
        for key, value in whole.items():
            np.testing.assert_allclose(split[key], value, rtol=1e-3, atol=1e-3, err_msg=key)
    model.store.close()
