"""Causal decoders with rotary positions and RMS norms: what Llama, Mistral and Qwen have in common.

The first layer's input is the word row itself. Sequences are padded on the right, so a token never sees padding and the
causal rule alone is the mask (None); a sliding window shorter than T needs one bool mask [1,1,T,T] for the whole batch.
Hidden states at padding positions are finite and meaningless.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_sliding_window_causal_mask

from chainfed_engine.errors import UnsupportedModel
from chainfed_engine.model.families.base import Config, Family, LayerContext, Pooling, checked_mask, without_weights
from chainfed_engine.types import Batch, ModelShape


class DecoderFamily(Family):
    """Set `layer_class`, `norm_class` and `rotary_class` to the library's classes."""

    layer_class: ClassVar[type[nn.Module]]
    norm_class: ClassVar[type[nn.Module]]
    rotary_class: ClassVar[type[nn.Module]]
    lora_targets = ("self_attn.q_proj", "self_attn.v_proj")
    pooling: ClassVar[Pooling] = "last"
    transform_activation: ClassVar[Literal["tanh", "relu"] | None] = None

    def check(self, values: Mapping[str, Any]) -> None:
        if values.get("is_causal", True) is not True:
            raise UnsupportedModel(f"{self.model_type} with is_causal = false: expected a causal decoder")

    def shape(self, config: Config) -> ModelShape:
        heads = int(config.num_attention_heads)
        return ModelShape(
            architecture=self.model_type,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=heads,
            num_kv_heads=config.num_key_value_heads or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
        )

    def layer(self, config: Config, index: int) -> nn.Module:
        return without_weights(lambda: self.layer_class(config, layer_idx=index))

    def embeddings(self, config: Config) -> nn.Module:
        return nn.Identity()

    def embed(self, module: nn.Module, words: Tensor, batch: Batch) -> Tensor:
        return words

    def final_norm(self, config: Config) -> nn.Module | None:
        return without_weights(lambda: self.norm_class(config.hidden_size, eps=config.rms_norm_eps))

    def attention_kind(self, config: Config, index: int) -> str:
        kinds = getattr(config, "layer_types", None)
        return str(kinds[index]) if kinds else "full_attention"

    def context(self, config: Config, batch: Batch, hidden: Tensor) -> LayerContext:
        checked_mask(batch, config.max_position_embeddings)
        positions = torch.arange(hidden.shape[1])[None]
        # Built anew: a dynamic rotary module keeps the longest length it has seen, and a pass must not depend on that.
        cos, sin = self.rotary_class(config)(hidden, positions)
        masks: dict[str, Tensor | None] = {}
        for kind in {self.attention_kind(config, index) for index in range(config.num_hidden_layers)}:
            masks[kind] = self._mask(config, kind, hidden)
        return LayerContext(masks, rotary=(cos, sin))

    def _mask(self, config: Config, kind: str, hidden: Tensor) -> Tensor | None:
        if kind == "full_attention":
            return None
        if kind != "sliding_attention":
            raise UnsupportedModel(f"{self.model_type} with {kind!r} layers: expected full or sliding attention")
        mask: Tensor | None = create_sliding_window_causal_mask(
            config=config, inputs_embeds=hidden[:1], attention_mask=None, past_key_values=None
        )
        return mask
