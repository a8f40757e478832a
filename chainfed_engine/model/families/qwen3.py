"""Qwen3: RMS norms on query and key, head size set apart from the hidden size, sliding windows by layer."""

from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from chainfed_engine.model.families.decoder import DecoderFamily


class Qwen3(DecoderFamily):
    model_type = "qwen3"
    config_class = Qwen3Config
    layer_class = Qwen3DecoderLayer
    norm_class = Qwen3RMSNorm
    rotary_class = Qwen3RotaryEmbedding


FAMILY = Qwen3()
