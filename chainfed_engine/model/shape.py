"""`ModelShape` from a Hugging Face config dict: sizes only, no transformers, no torch. Configs are hostile."""

from typing import Any

from chainfed_engine.errors import UnsupportedModel
from chainfed_engine.types import ModelShape

_MAX_SIZE = 1 << 31
_MAX_LAYERS = 4096


def model_shape(config: dict[str, Any]) -> ModelShape:
    """Sizes of the model that `config` describes.

    Raises UnsupportedModel naming the key when a size is missing, no integer, out of 1 .. 2**31, or inconsistent.
    """
    architecture = config.get("model_type")
    if not isinstance(architecture, str):
        raise UnsupportedModel(f"config: model_type is {architecture!r:.100}; expected a Hugging Face model type")
    distil = architecture == "distilbert"
    hidden_size = config_size(config, "dim" if distil else "hidden_size")
    num_heads = config_size(config, "n_heads" if distil else "num_attention_heads")
    num_kv_heads = config_size(config, "num_key_value_heads", num_heads)
    head_dim = config_size(config, "head_dim", hidden_size // num_heads or None)
    if num_heads % num_kv_heads:
        raise UnsupportedModel(f"config: {num_heads} attention heads are no multiple of {num_kv_heads} key/value heads")
    return ModelShape(
        architecture=architecture,
        num_layers=config_size(config, "n_layers" if distil else "num_hidden_layers", largest=_MAX_LAYERS),
        hidden_size=hidden_size,
        intermediate_size=config_size(config, "hidden_dim" if distil else "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=config_size(config, "vocab_size"),
        max_positions=_max_positions(config, architecture),
    )


def _max_positions(config: dict[str, Any], architecture: str) -> int:
    """Tokens a sequence may have. RoBERTa's first token reads row pad_token_id + 1 of the position table."""
    rows = config_size(config, "max_position_embeddings")
    if architecture != "roberta":
        return rows
    pad_token_id = config.get("pad_token_id", 1)
    if type(pad_token_id) is not int or not 0 <= pad_token_id < rows - 1:
        raise UnsupportedModel(f"config: pad_token_id is {pad_token_id!r:.100}; expected 0 .. {rows - 2}")
    return rows - pad_token_id - 1


def config_size(config: dict[str, Any], key: str, default: int | None = None, largest: int = _MAX_SIZE) -> int:
    """The integer `key` of a config in 1 .. largest, `default` when absent or null; UnsupportedModel otherwise."""
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= largest:
        raise UnsupportedModel(f"config: {key} is {value!r:.100}; expected an integer in 1 .. {largest}")
    return value
