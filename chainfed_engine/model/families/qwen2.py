"""Qwen2 and Qwen2.5: biases on query, key and value; some layers may attend to a sliding window."""

from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from chainfed_engine.model.families.decoder import DecoderFamily


class Qwen2(DecoderFamily):
    model_type = "qwen2"
    config_class = Qwen2Config
    layer_class = Qwen2DecoderLayer
    norm_class = Qwen2RMSNorm
    rotary_class = Qwen2RotaryEmbedding


FAMILY = Qwen2()
