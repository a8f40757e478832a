"""Bidirectional encoders with learned positions: what BERT, RoBERTa and DistilBERT have in common.

Word rows go through the library's own embeddings module (positions, token types, layer norm); every layer attends to
every token, so that the shared mask is one bool a key position, [B,1,1,T], or None for a batch without padding.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from chainfed_engine.model.families.base import Config, Family, LayerContext, Pooling, without_weights
from chainfed_engine.types import Batch


class EncoderFamily(Family):
    """Set `layer_class` and `embeddings_class` to the library's classes."""

    layer_class: ClassVar[type[nn.Module]]
    embeddings_class: ClassVar[type[nn.Module]]
    required: ClassVar[Mapping[str, object]] = MappingProxyType(
        {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
    )
    pooling: ClassVar[Pooling] = "first"
    transform_activation: ClassVar[Literal["tanh", "relu"] | None] = "tanh"

    def position_ids(self, config: Config, input_ids: Tensor) -> Tensor:
        """int64 [1,T] or [B,T]."""
        return torch.arange(input_ids.shape[1])[None]

    def layer(self, config: Config, index: int) -> nn.Module:
        return without_weights(lambda: self.layer_class(config, layer_idx=index))

    def embeddings(self, config: Config) -> nn.Module:
        module = without_weights(lambda: self.embeddings_class(config))
        del module.word_embeddings
        # Default ids, read only when the caller gives none; ours are always explicit, and meta buffers hold no values.
        for name in [name for name, _ in module.named_buffers()]:
            delattr(module, name)
        return module

    def embed(self, config: Config, module: nn.Module, words: Tensor, batch: Batch) -> Tensor:
        types = batch.token_type_ids if batch.token_type_ids is not None else torch.zeros_like(batch.input_ids)
        positions = self.position_ids(config, batch.input_ids)
        hidden: Tensor = module(inputs_embeds=words, position_ids=positions, token_type_ids=types)
        return hidden

    def final_norm(self, config: Config) -> nn.Module | None:
        return None

    def attention_kind(self, config: Config, index: int) -> str:
        return "full_attention"

    def context(self, config: Config, tokens: Tensor) -> LayerContext:
        mask = None if bool(tokens.all()) else tokens[:, None, None, :]
        return LayerContext({"full_attention": mask}, rotary=None)
