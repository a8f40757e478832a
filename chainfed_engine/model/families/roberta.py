"""RoBERTa: BERT's layer; positions count from padding_idx + 1 and skip padding tokens."""

from typing import cast

from torch import Tensor
from transformers.models.roberta.configuration_roberta import RobertaConfig
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings, RobertaLayer

from chainfed_engine.model.families.base import Config
from chainfed_engine.model.families.encoder import EncoderFamily


class Roberta(EncoderFamily):
    model_type = "roberta"
    config_class = RobertaConfig
    layer_class = RobertaLayer
    embeddings_class = RobertaEmbeddings
    lora_targets = ("attention.self.query", "attention.self.value")

    def position_ids(self, config: Config, input_ids: Tensor) -> Tensor:
        ids = RobertaEmbeddings.create_position_ids_from_input_ids(input_ids, config.pad_token_id)  # type: ignore[no-untyped-call]
        return cast("Tensor", ids)


FAMILY = Roberta()
