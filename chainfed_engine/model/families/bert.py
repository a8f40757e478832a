"""BERT, and the sentence encoders built on it (MiniLM)."""

from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer

from chainfed_engine.model.families.encoder import EncoderFamily


class Bert(EncoderFamily):
    model_type = "bert"
    config_class = BertConfig
    layer_class = BertLayer
    embeddings_class = BertEmbeddings
    lora_targets = ("attention.self.query", "attention.self.value")


FAMILY = Bert()
