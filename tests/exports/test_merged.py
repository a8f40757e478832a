"""Merged checkpoints, loaded by transformers: from original weights, from the store, in shards, in half precision."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import chainfed_engine as cfe
from chainfed_engine.errors import CorruptFile
from chainfed_engine.model.convert import convert
from chainfed_engine.types import Batch
from tests.conftest import CONFIGS, DECODERS, ENCODERS, Checkpoint, inputs, relative_error
from tests.exports.conftest import LABELS, engine_logits, original

Make = Callable[..., Checkpoint]
TOLERANCE = 3e-5  # two f32 implementations of three layers, weights of deviation 0.15


def load(kind: Any, folder: Path) -> Any:
    """Every weight of the model must come from the folder."""
    model, report = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not report["unexpected_keys"]
    assert all("pooler" in name for name in report["missing_keys"])
    return model.eval()


def token_logits(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(batch)).logits[batch.attention_mask.bool()].float()


@pytest.mark.parametrize("from_base", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_a_merged_causal_lm_has_the_engines_logits(
    checkpoint: Make, make_run: Any, padded_batch: Batch, name: str, from_base: bool, tmp_path: Path
) -> None:
    made = checkpoint(name, "ForCausalLM")
    run = make_run(made)
    cfe.export(run, tmp_path / "out", "merged", base=original(made) if from_base else None)
    model = load(transformers.AutoModelForCausalLM, tmp_path / "out")
    assert type(model).__name__ == f"{CONFIGS[name][0]}ForCausalLM"
    assert relative_error(token_logits(model, padded_batch), engine_logits(run, padded_batch)) <= TOLERANCE


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("name", [*ENCODERS, "llama-tied", "mistral"])
def test_a_merged_classifier_knows_its_labels(
    checkpoint: Make, make_run: Any, padded_batch: Batch, name: str, own_head: bool, tmp_path: Path
) -> None:
    plain = "Model" if name in ENCODERS else "ForCausalLM"
    made = checkpoint(name, "ForSequenceClassification" if own_head else plain)
    run = make_run(made, labels=LABELS)
    cfe.export(run, tmp_path / "out", "merged")
    model = load(transformers.AutoModelForSequenceClassification, tmp_path / "out")
    assert model.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        got = model(**inputs(padded_batch, model.config.pad_token_id)).logits
    assert relative_error(got, engine_logits(run, padded_batch)) <= TOLERANCE


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "qwen2"])
def test_a_classifier_of_the_mean_leaves_a_model_without_head(
    checkpoint: Make, make_run: Any, name: str, tmp_path: Path
) -> None:
    made = checkpoint(name, "Model" if name in ENCODERS else "ForCausalLM")
    done = cfe.export(make_run(made, labels=LABELS, pooling="mean"), tmp_path / "out", "merged")
    load(transformers.AutoModel, tmp_path / "out")
    assert (tmp_path / "out" / "classifier.safetensors").is_file() and "mean" in " ".join(done.notes)


@pytest.mark.parametrize("block_format", ["int4", "nf4", "int8", "bf16"])
def test_a_quantised_store_gives_its_own_weights_back_and_says_so(
    checkpoint: Make, make_run: Any, padded_batch: Batch, block_format: str, tmp_path: Path
) -> None:
    made = checkpoint("llama", "ForCausalLM", block_format)
    run = make_run(made)
    done = cfe.export(run, tmp_path / "out", "merged", dtype="f32")
    model = load(transformers.AutoModelForCausalLM, tmp_path / "out")
    assert relative_error(token_logits(model, padded_batch), engine_logits(run, padded_batch)) <= TOLERANCE
    assert any(f"{block_format} rounding" in note for note in done.notes) == (block_format != "bf16")
    exact = cfe.export(run, tmp_path / "exact", "merged", base=original(made))
    assert any("original checkpoint" in note for note in exact.notes)


def test_shards_have_an_index_and_half_precision_halves_the_size(
    checkpoint: Make, make_run: Any, padded_batch: Batch, tmp_path: Path
) -> None:
    made = checkpoint("llama", "ForCausalLM")
    run = make_run(made)
    seen: list[tuple[int, int]] = []
    cfe.export(run, tmp_path / "f32", "merged", progress=lambda name, done, total: seen.append((done, total)))
    cfe.export(run, tmp_path / "bf16", "merged", dtype="bf16", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "bf16" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "bf16").glob("model-*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values()) and len(files) > 2
    assert seen[-1][0] == seen[-1][1] == 2 * index["metadata"]["total_size"]
    full, half = (load(transformers.AutoModelForCausalLM, tmp_path / name) for name in ("f32", "bf16"))
    assert half.dtype == torch.bfloat16
    assert relative_error(token_logits(half, padded_batch), token_logits(full, padded_batch)) <= 0.03
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_that_fails_leaves_nothing_behind(checkpoint: Make, make_run: Any, tmp_path: Path) -> None:
    made = checkpoint("llama", "ForCausalLM")
    run = make_run(made)
    broken = tmp_path / "broken"
    made.reference.save_pretrained(broken)
    model = transformers.AutoModelForCausalLM.from_pretrained(broken)
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(broken)
    before = set(tmp_path.iterdir())
    with pytest.raises(CorruptFile, match="up_proj"):
        cfe.export(run, tmp_path / "out", "merged", base=broken)
    assert set(tmp_path.iterdir()) == before


def test_memory_does_not_grow_with_the_model(tmp_path: Path, make_run: Any) -> None:
    peaks = []
    for num_layers in (2, 8):
        config = transformers.LlamaConfig(
            vocab_size=512,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=num_layers,
            num_attention_heads=8,
            max_position_embeddings=64,
        )
        folder = tmp_path / f"layers-{num_layers}"
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "checkpoint")
        with pytest.warns(UserWarning, match="no tokenizer"):
            store = convert(folder / "checkpoint", folder / "store", block_format="int4")
        run = make_run(Checkpoint(None, store), layers=())
        cfe.export(run, folder / "warm", "peft")
        tracemalloc.start()
        cfe.export(run, folder / "out", "merged", dtype="f32")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 3_000_000  # six layers more are 38 MB in f32
