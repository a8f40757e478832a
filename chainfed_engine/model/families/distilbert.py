"""DistilBERT: six of BERT's layers under other names, no token types, a ReLU before the classifier."""

from typing import ClassVar, Literal

from torch import Tensor, nn
from transformers.models.distilbert.configuration_distilbert import DistilBertConfig
from transformers.models.distilbert.modeling_distilbert import Embeddings, TransformerBlock

from chainfed_engine.model.families.base import Config, without_weights
from chainfed_engine.model.families.encoder import EncoderFamily
from chainfed_engine.types import Batch


class DistilBert(EncoderFamily):
    model_type = "distilbert"
    config_class = DistilBertConfig
    layer_class = TransformerBlock
    embeddings_class = Embeddings
    lora_targets = ("attention.q_lin", "attention.v_lin")
    transform_activation: ClassVar[Literal["tanh", "relu"] | None] = "relu"

    def layer(self, config: Config, index: int) -> nn.Module:
        return without_weights(lambda: TransformerBlock(config))

    def embed(self, config: Config, module: nn.Module, words: Tensor, batch: Batch) -> Tensor:
        positions = self.position_ids(config, batch.input_ids)
        hidden: Tensor = module(input_ids=None, inputs_embeds=words, position_ids=positions)
        return hidden


FAMILY = DistilBert()
