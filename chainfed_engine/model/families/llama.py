"""Llama 2 and 3, SmolLM2 and the many models that keep their architecture."""

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from chainfed_engine.model.families.decoder import DecoderFamily


class Llama(DecoderFamily):
    model_type = "llama"
    config_class = LlamaConfig
    layer_class = LlamaDecoderLayer
    norm_class = LlamaRMSNorm
    rotary_class = LlamaRotaryEmbedding


FAMILY = Llama()
