"""Mistral: Llama with, in early versions, a sliding window in every layer."""

from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRMSNorm, MistralRotaryEmbedding

from chainfed_engine.model.families.base import Config
from chainfed_engine.model.families.decoder import DecoderFamily


class Mistral(DecoderFamily):
    model_type = "mistral"
    config_class = MistralConfig
    layer_class = MistralDecoderLayer
    norm_class = MistralRMSNorm
    rotary_class = MistralRotaryEmbedding

    def attention_kind(self, config: Config, index: int) -> str:
        return "full_attention" if config.sliding_window is None else "sliding_attention"


FAMILY = Mistral()
