"""A GGUF file's metadata and tensor names in Hugging Face terms: the config dict and the checkpoint's names.

Pure tables and arithmetic; no bytes of tensors except the RoPE factors, which the caller passes in. Supported: the
GGUF architectures llama (Llama, SmolLM2, Mistral), qwen2 and qwen3.
"""

import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chainfed_engine.errors import CorruptFile, UnsupportedModel
from chainfed_engine.model.convert.gguf_header import ArrayLength

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_FACTORS = "rope_freqs.weight"
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
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
_BLOCK_NAME = re.compile(r"blk\.(\d{1,5})\.([a-z_]+)\.(weight|bias)")


def hf_name(name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None for a name outside the table."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP and kind == "weight":
        return f"{_TOP[stem]}.weight"
    match = _BLOCK_NAME.fullmatch(name)
    if match is None or match[2] not in _BLOCK:
        return None
    return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{match[3]}"


def hf_config(
    metadata: dict[str, Any], names: set[str], vocab_size: int, rope_factors: NDArray[np.float32] | None
) -> dict[str, Any]:
    """The Hugging Face config dict of a file with this metadata and these tensors.

    rope_factors: the tensor `rope_freqs.weight` [head_dim / 2], if any. Raises UnsupportedModel for an architecture,
    split file, mixture of experts or RoPE scaling that the engine does not run; CorruptFile for missing metadata.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"GGUF architecture {architecture!r:.100}: expected one of {', '.join(ARCHITECTURES)}; "
            "encoders are converted from safetensors"
        )
    if metadata.get("split.count") not in (None, 0, 1):
        raise UnsupportedModel(
            "the GGUF file is one part of a split file; join them first with llama-gguf-split --merge"
        )
    fields = _Fields(metadata, architecture)
    if fields.optional("expert_count", 0) > 0:
        raise UnsupportedModel("the GGUF file is a mixture of experts, which the engine does not run")
    hidden_size, num_heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.optional("attention.key_length", hidden_size // num_heads)
    if fields.optional("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel(
            "the GGUF file rotates only a part of each attention head, which the engine does not run"
        )
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.optional("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.real("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields, head_dim, rope_factors),
        "tie_word_embeddings": "output.weight" not in names,
    }
    if architecture != "qwen2":  # Qwen2 always has the three biases; the others say so
        config["attention_bias"] = "blk.0.attn_q.bias" in names
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    for key, source in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token = metadata.get(f"tokenizer.ggml.{source}_token_id")
        config[key] = token if type(token) is int and 0 <= token < vocab_size else None
    return config


class _Fields:
    """Typed look-up of `<architecture>.<key>`."""

    def __init__(self, metadata: dict[str, Any], architecture: str):
        self._metadata, self._architecture = metadata, architecture

    def optional(self, key: str, default: Any) -> Any:
        value = self._metadata.get(f"{self._architecture}.{key}", default)
        if isinstance(value, ArrayLength):
            raise UnsupportedModel(f"GGUF metadata {self._architecture}.{key} differs between layers")
        if type(value) is not type(default):
            raise CorruptFile(
                f"GGUF metadata {self._architecture}.{key} is {value!r:.100}; expected {default!r}'s type"
            )
        return value

    def integer(self, key: str) -> int:
        value = self.optional(key, 0)
        if not 1 <= value <= 1 << 31:
            raise CorruptFile(f"GGUF metadata {self._architecture}.{key} is {value}; expected 1 .. 2**31")
        return int(value)

    def real(self, key: str, default: float = 0.0) -> float:
        """A positive number, with the few digits that its f32 form carries (1e-05, not 9.999999747378752e-06)."""
        value = self.optional(key, default)
        if not (value > 0 and math.isfinite(value)):
            raise CorruptFile(f"GGUF metadata {self._architecture}.{key} is {value}; expected a positive number")
        return float(np.format_float_scientific(np.float32(value)))


def _rope_scaling(fields: _Fields, head_dim: int, rope_factors: NDArray[np.float32] | None) -> dict[str, Any] | None:
    kind = fields.optional("rope.scaling.type", "none")
    if rope_factors is not None:
        return _llama3_scaling(rope_factors, head_dim, fields.real("rope.freq_base", 10000.0))
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": fields.real("rope.scaling.factor")}
    if kind == "yarn":
        original = fields.integer("rope.scaling.original_context_length")
        factor = fields.real("rope.scaling.factor")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UnsupportedModel(f"RoPE scaling {kind[:50]!r} in the GGUF file: expected none, linear, yarn or Llama 3's")


def _llama3_scaling(rope_factors: NDArray[np.float32], head_dim: int, rope_theta: float) -> dict[str, Any]:
    """Llama 3's scaling from the per-frequency factors the file carries, checked against them to 1e-4."""
    factor = float(rope_factors.max(initial=1.0))
    if not math.isfinite(factor):
        raise CorruptFile(f"{ROPE_FACTORS} in the GGUF file holds {factor}")
    original, low, high = 8192, 1.0, 4.0  # of every Llama 3.1, 3.2 and 3.3
    wavelengths = 2 * np.pi * rope_theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1 - smooth) / factor + smooth)
    if rope_factors.shape != expected.shape or not np.allclose(rope_factors, expected, rtol=1e-4):
        raise UnsupportedModel(f"{ROPE_FACTORS} in the GGUF file does not hold Llama 3's RoPE factors")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
