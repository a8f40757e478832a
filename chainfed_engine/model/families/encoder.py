"""Bidirectional encoders with learned positions: what BERT, RoBERTa and DistilBERT have in common.

Word rows go through the library's own embeddings module (positions, token types, layer norm); every layer attends to
every token, so that the shared mask is one bool a key position, [B,1,1,T], or None for a batch without padding.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from chainfed_engine.errors import UnsupportedModel
from chainfed_engine.model.families.base import Config, Family, LayerContext, Pooling, checked_mask, without_weights
from chainfed_engine.types import Batch, ModelShape


class EncoderFamily(Family):
    """Set `layer_class` and `embeddings_class` to the library's classes."""

    layer_class: ClassVar[type[nn.Module]]
    embeddings_class: ClassVar[type[nn.Module]]
    pooling: ClassVar[Pooling] = "first"
    transform_activation: ClassVar[Literal["tanh", "relu"] | None] = "tanh"

    def check(self, values: Mapping[str, Any]) -> None:
        for key, wanted in (("is_decoder", False), ("add_cross_attention", False)):
            if values.get(key, wanted) != wanted:
                raise UnsupportedModel(f"{self.model_type} with {key} = {values[key]}: expected an encoder")
        if values.get("position_embedding_type", "absolute") != "absolute":
            raise UnsupportedModel(
                f"{self.model_type} with position_embedding_type {values['position_embedding_type']!r}: expected "
                "'absolute'; use a checkpoint with learned absolute positions"
            )

    def shape(self, config: Config) -> ModelShape:
        heads = int(config.num_attention_heads)
        return ModelShape(
            architecture=self.model_type,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=self.intermediate_size(config),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=config.hidden_size // heads,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings - self.first_position(config),
        )

    def intermediate_size(self, config: Config) -> int:
        return int(config.intermediate_size)

    def first_position(self, config: Config) -> int:
        """Row of the position table that the first token reads."""
        return 0

    def position_ids(self, config: Config, input_ids: Tensor) -> Tensor:
        """int64 [1,T] or [B,T]."""
        return torch.arange(input_ids.shape[1])[None]

    def layer(self, config: Config, index: int) -> nn.Module:
        return without_weights(lambda: self.layer_class(config, layer_idx=index))

    def embeddings(self, config: Config) -> nn.Module:
        module = without_weights(lambda: self.embeddings_class(config))
        module.config = config
        del module.word_embeddings
        # Default ids, read only when the caller gives none; ours are always explicit, and meta buffers hold no values.
        for name in [name for name, _ in module.named_buffers()]:
            delattr(module, name)
        return module

    def embed(self, module: nn.Module, words: Tensor, batch: Batch) -> Tensor:
        types = batch.token_type_ids if batch.token_type_ids is not None else torch.zeros_like(batch.input_ids)
        positions = self.position_ids(module.config, batch.input_ids)
        hidden: Tensor = module(inputs_embeds=words, position_ids=positions, token_type_ids=types)
        return hidden

    def final_norm(self, config: Config) -> nn.Module | None:
        return None

    def attention_kind(self, config: Config, index: int) -> str:
        return "full_attention"

    def context(self, config: Config, batch: Batch, hidden: Tensor) -> LayerContext:
        tokens = checked_mask(batch, self.shape(config).max_positions)
        mask = None if bool(tokens.all()) else tokens[:, None, None, :]
        return LayerContext({"full_attention": mask}, rotary=None)
