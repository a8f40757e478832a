"""`ModelShape` from a Hugging Face config dict: sizes only, no transformers, no torch. Configs are hostile."""

from typing import Any

from chainfed_engine.errors import UnsupportedModel
from chainfed_engine.types import ModelShape

_MAX_SIZE = 1 << 31


def model_shape(config: dict[str, Any]) -> ModelShape:
    """Sizes of the model that `config` describes.

    Raises UnsupportedModel naming the key when a size is missing, no integer, out of 1 .. 2**31, or inconsistent.
    """
    architecture = config.get("model_type")
    if not isinstance(architecture, str):
        raise UnsupportedModel(f"config: model_type is {architecture!r:.100}; expected a Hugging Face model type")
    distil = architecture == "distilbert"
    hidden_size = _size(config, "dim" if distil else "hidden_size")
    num_heads = _size(config, "n_heads" if distil else "num_attention_heads")
    num_kv_heads = _size(config, "num_key_value_heads", num_heads)
    head_dim = _size(config, "head_dim", hidden_size // num_heads or None)
    if num_heads % num_kv_heads:
        raise UnsupportedModel(f"config: {num_heads} attention heads are no multiple of {num_kv_heads} key/value heads")
    return ModelShape(
        architecture=architecture,
        num_layers=_size(config, "n_layers" if distil else "num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "hidden_dim" if distil else "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_size(config, "vocab_size"),
        max_positions=_size(config, "max_position_embeddings"),
    )


def _size(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= _MAX_SIZE:
        raise UnsupportedModel(f"config: {key} is {value!r:.100}; expected an integer in 1 .. 2**31")
    return value
