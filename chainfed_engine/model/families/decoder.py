"""Causal decoders with rotary positions and RMS norms: what Llama, Mistral and Qwen have in common.

The first layer's input is the word row itself. Sequences are padded on the right, so a token never sees padding and the
causal rule alone is the mask (None); a sliding window shorter than T needs one bool mask [1,1,T,T] for the whole batch.
Hidden states at padding positions are finite and meaningless.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_sliding_window_causal_mask

from chainfed_engine.errors import UnsupportedModel
from chainfed_engine.model.families.base import Config, Family, LayerContext, Pooling, without_weights
from chainfed_engine.model.families.gated import GatedMlp
from chainfed_engine.types import Batch


class DecoderFamily(Family):
    """Set `layer_class`, `norm_class` and `rotary_class` to the library's classes."""

    layer_class: ClassVar[type[nn.Module]]
    norm_class: ClassVar[type[nn.Module]]
    rotary_class: ClassVar[type[nn.Module]]
    required: ClassVar[Mapping[str, object]] = MappingProxyType({"is_causal": True, "hidden_act": "silu"})
    lora_targets = ("self_attn.q_proj", "self_attn.v_proj")
    pooling: ClassVar[Pooling] = "last"
    transform_activation: ClassVar[Literal["tanh", "relu"] | None] = None
    classifier_bias: ClassVar[bool] = False
    is_pre_norm: ClassVar[bool] = True

    def layer(self, config: Config, index: int) -> nn.Module:
        layer = without_weights(lambda: self.layer_class(config, layer_idx=index))
        library = layer.get_submodule("mlp")
        projections = (library.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
        layer.set_submodule("mlp", GatedMlp(*projections).eval())
        return layer

    def embeddings(self, config: Config) -> nn.Module:
        return nn.Identity()

    def embed(self, config: Config, module: nn.Module, words: Tensor, batch: Batch) -> Tensor:
        return words

    def final_norm(self, config: Config) -> nn.Module | None:
        return without_weights(lambda: self.norm_class(config.hidden_size, eps=config.rms_norm_eps))

    def attention_kind(self, config: Config, index: int) -> str:
        kinds = getattr(config, "layer_types", None)
        return str(kinds[index]) if kinds else "full_attention"

    def context(self, config: Config, tokens: Tensor) -> LayerContext:
        length = tokens.shape[1]
        # The library's helpers read shape and dtype from a tensor of embeddings; this one has no elements.
        outline = torch.empty(1, length, 0)
        # Built anew: a dynamic rotary module keeps the longest length it has seen, and a pass must not depend on that.
        cos, sin = self.rotary_class(config)(outline, torch.arange(length)[None])
        kinds = {self.attention_kind(config, index) for index in range(config.num_hidden_layers)}
        return LayerContext({kind: self._mask(config, kind, outline) for kind in kinds}, rotary=(cos, sin))

    def _mask(self, config: Config, kind: str, outline: Tensor) -> Tensor | None:
        if kind == "full_attention":
            return None
        if kind != "sliding_attention":
            raise UnsupportedModel(f"{self.model_type} with {kind!r} layers: expected full or sliding attention")
        mask = create_sliding_window_causal_mask(
            config=config, inputs_embeds=outline, attention_mask=None, past_key_values=None
        )
        return cast("Tensor | None", mask)  # a BlockMask only with flex attention
