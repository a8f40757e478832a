"""The tensors a checkpoint must have, by the Hugging Face names and shapes that its config implies.

Conversion compares a checkpoint with this table, so that a missing or misshapen tensor, or one the engine would
silently leave out, is an error before a byte is written; `synth` draws the same tensors at random. Encoders are listed
as their base model; classification and LM heads are optional there and checked by the caller.
"""

from typing import Any

from chainfed_engine.errors import UnsupportedModel
from chainfed_engine.model.families import SUPPORTED
from chainfed_engine.model.shape import config_size, model_shape
from chainfed_engine.types import ModelShape

Shapes = dict[str, tuple[int, ...]]


def checkpoint_shapes(config: dict[str, Any]) -> Shapes:
    """Name -> shape of every weight of the base model, in file order: embeddings, layers, final norm; no head.

    Raises UnsupportedModel for an architecture the engine does not run or a config without usable sizes.
    """
    shape = model_shape(config)
    if shape.architecture not in SUPPORTED:
        raise UnsupportedModel(
            f"architecture {shape.architecture[:100]!r}: expected one of {', '.join(SUPPORTED)}; "
            "use a checkpoint of one of these"
        )
    if shape.architecture == "distilbert":
        return _distilbert(shape)
    if shape.architecture in ("bert", "roberta"):
        return _bert(shape, config)
    return _decoder(shape, config)


def _linear(name: str, num_rows: int, num_cols: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (num_rows, num_cols)}
    return weight | {f"{name}.bias": (num_rows,)} if bias else weight


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _bert(shape: ModelShape, config: dict[str, Any]) -> Shapes:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    result: Shapes = {
        "embeddings.word_embeddings.weight": (shape.vocab_size, hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (config_size(config, "type_vocab_size", 2), hidden),
        **_norm("embeddings.LayerNorm", hidden),
    }
    for index in range(shape.num_layers):
        layer = f"encoder.layer.{index}."
        for name in ("query", "key", "value"):
            result |= _linear(f"{layer}attention.self.{name}", hidden, hidden, bias=True)
        result |= _linear(f"{layer}attention.output.dense", hidden, hidden, bias=True)
        result |= _norm(f"{layer}attention.output.LayerNorm", hidden)
        result |= _linear(f"{layer}intermediate.dense", inner, hidden, bias=True)
        result |= _linear(f"{layer}output.dense", hidden, inner, bias=True)
        result |= _norm(f"{layer}output.LayerNorm", hidden)
    return result


def _distilbert(shape: ModelShape) -> Shapes:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    result: Shapes = {
        "embeddings.word_embeddings.weight": (shape.vocab_size, hidden),
        "embeddings.position_embeddings.weight": (shape.max_positions, hidden),
        **_norm("embeddings.LayerNorm", hidden),
    }
    for index in range(shape.num_layers):
        layer = f"transformer.layer.{index}."
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            result |= _linear(f"{layer}attention.{name}", hidden, hidden, bias=True)
        result |= _norm(f"{layer}sa_layer_norm", hidden)
        result |= _linear(f"{layer}ffn.lin1", inner, hidden, bias=True)
        result |= _linear(f"{layer}ffn.lin2", hidden, inner, bias=True)
        result |= _norm(f"{layer}output_layer_norm", hidden)
    return result


def _decoder(shape: ModelShape, config: dict[str, Any]) -> Shapes:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    qwen2, qwen3, mistral = (shape.architecture == name for name in ("qwen2", "qwen3", "mistral"))
    attention_bias = not mistral and not qwen2 and bool(config.get("attention_bias", False))
    mlp_bias = shape.architecture == "llama" and bool(config.get("mlp_bias", False))
    result: Shapes = {"embed_tokens.weight": (shape.vocab_size, hidden), "norm.weight": (hidden,)}
    for index in range(shape.num_layers):
        attention, mlp = f"layers.{index}.self_attn.", f"layers.{index}.mlp."
        result[f"layers.{index}.input_layernorm.weight"] = (hidden,)
        result |= _linear(f"{attention}q_proj", query, hidden, qwen2 or attention_bias)
        result |= _linear(f"{attention}k_proj", key_value, hidden, qwen2 or attention_bias)
        result |= _linear(f"{attention}v_proj", key_value, hidden, qwen2 or attention_bias)
        result |= _linear(f"{attention}o_proj", hidden, query, attention_bias)
        if qwen3:
            result[f"{attention}q_norm.weight"] = result[f"{attention}k_norm.weight"] = (shape.head_dim,)
        result[f"layers.{index}.post_attention_layernorm.weight"] = (hidden,)
        result |= _linear(f"{mlp}gate_proj", inner, hidden, mlp_bias)
        result |= _linear(f"{mlp}up_proj", inner, hidden, mlp_bias)
        result |= _linear(f"{mlp}down_proj", hidden, inner, mlp_bias)
    return result
