"""The planner's counts against what the window really keeps, and its choices under a budget."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import MemoryBudgetExceeded
from chainfed_engine.memory.device import DeviceFacts
from chainfed_engine.memory.parts import adapter_floats, adapter_saved_floats, fill_bytes, is_decoder
from chainfed_engine.memory.plan import (
    Choices,
    DataFacts,
    Plan,
    Request,
    StoreSizes,
    make_plan,
    predict,
    saved_floats,
)
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.store import LayerStore
from chainfed_engine.model.synth import synth
from chainfed_engine.sizes import format_size
from chainfed_engine.step import StageTrainer
from chainfed_engine.types import Batch, ModelShape, Stage, Window

MIB = 1 << 20
SHAPE = ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072)
SIZES = StoreSizes(32 * 136 * MIB, 16 * 34 * MIB, 530 * MIB, 136 * MIB, 32, 16)


@pytest.mark.parametrize(
    ("model_type", "keys"), [("bert", 6), ("roberta", 6), ("distilbert", 6), ("llama", 6), ("llama", 2), ("qwen3", 2)]
)
@pytest.mark.parametrize("adapter", ["bottleneck", "lora"])
def test_the_window_keeps_exactly_the_floats_that_are_counted(
    model_type: str, keys: int, adapter: Literal["bottleneck", "lora"], tmp_path: Path
) -> None:
    names = ("dim", "hidden_dim", "n_layers", "n_heads")
    if model_type != "distilbert":
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {"model_type": model_type, "vocab_size": 300, **dict(zip(names, (384, 640, 3, 6), strict=True))}
    config["max_position_embeddings"] = 128
    if model_type in ("llama", "qwen3"):
        config |= {"num_key_value_heads": keys, "head_dim": 64, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = FrozenModel(LayerStore.open(synth(str(tmp_path / "config.json"), tmp_path / "store")))
    width, tokens = 32, 4 * 32
    config_of_run = ChainConfig(stand_in=False, adapter=adapter, adapter_size=width)
    trainer = StageTrainer(model, config_of_run, task="classification", num_labels=2)
    ids = torch.randint(5, 250, (4, 32), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.ones_like(ids), torch.arange(4) % 2, list("abcd"))
    stage = Stage("window", Window(1, 3), 0)
    trainer.begin(
        stage, trainer.parameters.export(), cache_dir=tmp_path / "cache", lr=1e-3, settings={"start_layer": 1}
    )
    boundary, context = trainer.boundary(batch), model.context(batch)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.numel() >= tokens * width:  # not weights, masks, statistics of norms or rotary angles
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    assert trainer.window is not None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = trainer.window(boundary, context)
    parameters = {p.untyped_storage().data_ptr() for p in trainer.parameters.tensors()}
    floats = sum(size for address, size in kept.items() if address not in parameters) / 4 / tokens
    one = saved_floats(model.shape)
    missing = 384 + (keys * 64 if model_type == "qwen3" else 0) if is_decoder(model.shape) else 0
    first = 0 if adapter == "bottleneck" else one - missing  # LoRA acts inside the first layer
    request = Request(model.shape, SIZES, config_of_run, "classification", interpreter_bytes=0)
    assert floats == first + one + 2 * adapter_saved_floats(request)
    assert adapter_floats(request) == sum(p.numel() for p in trainer.parameters.adapters[1].parameters())
    del output
    trainer.end()
    model.store.close()


def request(budget: int | None, **options: object) -> Request:
    config = ChainConfig(budget=budget, batch_size=4, sequence_length=128, **options)  # type: ignore[arg-type]
    return Request(SHAPE, SIZES, config, "causal-lm", interpreter_bytes=340 * MIB)


def test_without_a_budget_everything_stays_resident() -> None:
    plan = make_plan(request(None))
    kept = plan.choices.kept_heap_bytes
    assert plan.choices == Choices(21, None, 4, False, "int8", 4 * MIB, 0, kept)  # two thirds of the layers, at the top
    plan = make_plan(request(None, window=2))
    assert plan.choices == Choices(2, None, 4, False, "int8", 4 * MIB, 1024, plan.choices.kept_heap_bytes)


def test_the_heap_keeps_freed_blocks_where_the_budget_has_room_for_them() -> None:
    free = make_plan(request(None, window=2))
    kept = free.parts["heap kept for the next step"]
    phase = max(size for name, size in free.parts.items() if name.startswith("largest phase"))
    # What a step may add to a kept heap before it is trimmed is counted, not kept.
    assert int(1.1 * free.choices.kept_heap_bytes) == phase + kept > free.choices.kept_heap_bytes > phase
    held = make_plan(request(free.predicted_peak_bytes, window=2))
    assert held.choices == free.choices
    least = make_plan(request(free.smallest_budget_bytes, window=2))
    assert least.choices.kept_heap_bytes == 0


def test_a_budget_below_the_model_streams_it_and_the_prediction_keeps_to_it() -> None:
    plan = make_plan(request(2048 * MIB))
    assert plan.choices.num_slots is not None
    assert plan.predicted_peak_bytes <= 2048 * MIB
    assert sum(plan.parts.values()) == plan.predicted_peak_bytes


def test_what_the_user_fixed_is_never_changed_and_the_refusal_names_a_budget_that_does() -> None:
    with pytest.raises(MemoryBudgetExceeded, match="smallest that would do is") as refusal:
        make_plan(request(400 * MIB, window=8))
    assert "[memory] budget" in str(refusal.value)


def test_less_is_predicted_for_less() -> None:
    wide = request(None)
    wide = replace(wide, config=replace(wide.config, stand_in=False))
    full = predict(wide, Choices(2, None, 4, False, "int8", 4 * MIB)).predicted_peak_bytes
    for leaner in (
        Choices(2, 3, 4, False, "int8", 4 * MIB),
        Choices(2, None, 1, False, "int8", 4 * MIB),
        Choices(2, None, 4, True, "int8", 4 * MIB),
    ):
        assert predict(wide, leaner).predicted_peak_bytes < full


def test_foresight_counts_the_inputs_of_the_layers_above_the_window() -> None:
    config = ChainConfig(window=2, start_layer=0, auxiliary_weight=0, batch_size=4, sequence_length=128)
    request = Request(SHAPE, SIZES, config, "causal-lm", 400 * MIB)
    foreseeing = replace(request, config=replace(config, foresight_every=1))
    choices = replace(make_plan(request).choices, kept_heap_bytes=0)
    more = predict(foreseeing, choices).predicted_peak_bytes - predict(request, choices).predicted_peak_bytes
    assert more >= 30 * 4 * 128 * 4096 * 4


def test_a_start_up_beyond_the_run_is_the_peak_and_what_a_budget_is_held_to() -> None:
    """As with PyTorch's CUDA build, whose import peaks before its pages go back."""
    usual = make_plan(request(None))
    peak = usual.predicted_peak_bytes
    assert make_plan(replace(request(None), startup_bytes=peak)).parts == usual.parts
    high = make_plan(replace(request(peak + 2 * MIB), startup_bytes=peak + MIB))
    assert high.choices == usual.choices
    assert high.predicted_peak_bytes == peak + MIB == sum(high.parts.values()) == high.smallest_budget_bytes
    assert high.parts["start-up, beyond all of this"] == MIB
    assert "start-up, beyond all of this" in high.table()
    with pytest.raises(MemoryBudgetExceeded, match=f"would do is {peak + MIB} bytes.*importing PyTorch.*CPU build"):
        make_plan(replace(request(peak), startup_bytes=peak + MIB))


def test_start_up_counts_for_the_host_of_a_device_and_not_against_the_devices_budget() -> None:
    on_device = replace(request(None), device=DeviceFacts("cuda:0", is_unified=False))
    usual = make_plan(on_device)
    high = make_plan(replace(on_device, startup_bytes=1 << 40))
    assert high.parts == usual.parts
    assert high.facts["predicted_host_bytes"] == 1 << 40 > usual.facts["predicted_host_bytes"]
    board = replace(on_device, device=DeviceFacts("cuda:0", is_unified=True))
    assert make_plan(replace(board, startup_bytes=1 << 40)).predicted_peak_bytes == 1 << 40


WIDE = ModelShape("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072)
WIDE_SIZES = StoreSizes(16 * 36 * MIB, 8 * 36 * MIB, 260 * MIB, 36 * MIB, 16, 8)


def wide_request(budget: int | None, **options: object) -> Request:
    config = ChainConfig(budget=budget, batch_size=4, sequence_length=128, window=2, **options)  # type: ignore[arg-type]
    return Request(WIDE, WIDE_SIZES, config, "causal-lm", interpreter_bytes=240 * MIB)


def test_a_short_budget_takes_fewer_rows_for_the_stand_ins_and_says_what_twice_as_many_would_take() -> None:
    plenty, short = make_plan(wide_request(None)), make_plan(wide_request(512 * MIB))
    assert plenty.choices.stand_in_rows == 4095
    assert 256 <= short.choices.stand_in_rows < 4095
    assert short.predicted_peak_bytes <= 512 * MIB
    assert "of 4095" in short.reasons["stand_in_rows"]
    assert short.recorded_in(ChainConfig()).stand_in_rows == short.choices.stand_in_rows


def test_rows_that_the_user_fixed_are_kept_and_refused_where_they_do_not_fit() -> None:
    assert make_plan(wide_request(None, stand_in_rows=700)).choices.stand_in_rows == 700
    with pytest.raises(MemoryBudgetExceeded, match=r"\[chain\] stand_in_rows = 2047 saves"):
        make_plan(wide_request(512 * MIB, stand_in_rows=4095))


def test_hidden_states_of_a_fill_are_no_more_than_the_samples_there_are() -> None:
    few = replace(wide_request(None), facts=DataFacts(128, 127, largest_client_samples=8, evaluation_samples=4))
    choices = Choices(2, 2, 4, False, "int8", 64 * MIB, 1024)
    assert fill_bytes(wide_request(None), choices) - fill_bytes(few, choices) == 64 * MIB - 8 * 128 * 2048 * 4


def test_a_causal_lm_is_told_of_lora_end_to_end_where_it_fits_and_only_there() -> None:
    plan = make_plan(request(2048 * MIB))
    assert plan.advice is not None
    said = make_plan(request(2048 * MIB, method="lora"))
    assert format_size(said.predicted_peak_bytes) in plan.advice
    assert said.advice is None
    assert plan.table().endswith(f"advice: {plan.advice}")
    least = said.smallest_budget_bytes
    assert make_plan(request(least)).advice is not None
    assert make_plan(request(least - 1)).advice is None
    assert make_plan(replace(request(None), task="classification")).advice is None
    assert make_plan(request(None)).advice is None  # two thirds of the layers at once fit, which learn as much


ENCODER = ModelShape("bert", 12, 768, 3072, 12, 12, 64, 30522, 512)
ENCODER_SIZES = StoreSizes(12 * 5 * MIB, 0, 15 * MIB, 5 * MIB, 12, 0)


def encoder_plan(budget: int | None, **options: object) -> Plan:
    config = ChainConfig(budget=budget, batch_size=16, sequence_length=128, **options)  # type: ignore[arg-type]
    return make_plan(Request(ENCODER, ENCODER_SIZES, config, "classification", interpreter_bytes=240 * MIB))


def test_a_window_left_open_is_two_thirds_of_the_layers_or_as_many_as_slow_no_step_down() -> None:
    plenty = encoder_plan(None)
    assert plenty.choices.window == 8
    assert plenty.recorded_in(ChainConfig()).window == 8
    parts = encoder_plan(600 * MIB)  # of like lengths, which cost nothing: the window stays as it is
    assert parts.choices.window == 8 and 2 <= parts.choices.micro_batch < 16
    narrower = encoder_plan(415 * MIB)
    assert 2 < narrower.choices.window < 8
    assert "without slowing steps down" in narrower.reasons["window"]
    assert not narrower.choices.recompute
    assert narrower.choices.micro_batch * 128 >= 256  # parts no smaller than products are fast


def test_what_was_given_up_would_not_have_fitted_or_would_not_have_been_faster() -> None:
    shape = ModelShape("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192)
    sizes = StoreSizes(63 * MIB, 28 * MIB, 6 << 10, 5 * MIB, 30, 6)
    for budget in range(380, 620, 30):
        config = ChainConfig(budget=budget * MIB, batch_size=4, sequence_length=128)
        plan = make_plan(Request(shape, sizes, config, "causal-lm", interpreter_bytes=223 * MIB))
        quoted = [re.search(r"(?:peak at|peak would be) ([\d.]+) MiB", reason) for reason in plan.reasons.values()]
        assert any(quoted) and all(float(found[1]) > budget for found in quoted if found), plan.reasons
    facts = DataFacts(longest_tokens=128, mean_tokens=40)
    varied = make_plan(Request(shape, sizes, replace(config, budget=None), "causal-lm", 223 * MIB, facts=facts))
    assert varied.choices.micro_batch < 4 and "less padding" in varied.reasons["micro_batch"]


def test_parts_with_a_kept_heap_go_before_the_whole_batch_with_a_lean_one() -> None:
    free = encoder_plan(None)
    held = encoder_plan(free.predicted_peak_bytes - free.parts["heap kept for the next step"])
    assert held.choices.kept_heap_bytes > 0
    assert held.choices.window == free.choices.window and held.choices.micro_batch < free.choices.micro_batch


def test_a_window_left_open_slides_under_a_tight_budget_and_the_refusal_names_what_its_narrowest_needs() -> None:
    least = encoder_plan(None).smallest_budget_bytes
    assert encoder_plan(least).choices.window <= 2
    with pytest.raises(MemoryBudgetExceeded, match=f"smallest that would do is {least} bytes"):
        encoder_plan(least - 1)
    assert encoder_plan(None, window=4).choices.window == 4  # what the user fixed stays
