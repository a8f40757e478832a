"""Tiny random checkpoints of every architecture, made with transformers, and a reader of f32 and bf16 stores."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from transformers import PreTrainedModel

from chainfed_engine.model.format import FileInfo

_ENCODER = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
}
_DECODER = _ENCODER | {"num_key_value_heads": 2, "head_dim": 16}
_DISTIL = {"vocab_size": 99, "dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 40}
_LABELS = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}

# name -> (model class, config class, config, path of the list of layers)
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertModel", "BertConfig", _ENCODER, "encoder.layer"),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", _ENCODER, "bert.encoder.layer"),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", _ENCODER | _LABELS, "bert.encoder.layer"),
    "bert-tokens": ("BertForTokenClassification", "BertConfig", _ENCODER | _LABELS, "bert.encoder.layer"),
    "roberta-mlm": ("RobertaForMaskedLM", "RobertaConfig", _ENCODER, "roberta.encoder.layer"),
    "roberta-classifier": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _ENCODER | _LABELS,
        "roberta.encoder.layer",
    ),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", _ENCODER, "encoder.layer"),
    "distilbert": ("DistilBertModel", "DistilBertConfig", _DISTIL, "transformer.layer"),
    "distilbert-classifier": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        _DISTIL | _LABELS,
        "distilbert.transformer.layer",
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER | {"tie_word_embeddings": False}, "model.layers"),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", _DECODER | {"tie_word_embeddings": True}, "model.layers"),
    "llama-base": ("LlamaModel", "LlamaConfig", _DECODER, "layers"),
    "llama-biases": (
        "LlamaForCausalLM",
        "LlamaConfig",
        _DECODER | {"attention_bias": True, "mlp_bias": True},
        "model.layers",
    ),
    "llama-classifier": ("LlamaForSequenceClassification", "LlamaConfig", _DECODER | _LABELS, "model.layers"),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER, "model.layers"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER, "model.layers"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER | {"tie_word_embeddings": True}, "model.layers"),
}
HEAD_NAMES = {
    "bert-classifier": ("bert.pooler.dense", "classifier"),
    "roberta-classifier": ("classifier.dense", "classifier.out_proj"),
    "distilbert-classifier": ("pre_classifier", "classifier"),
}


def save_checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """Save the random model of `CASES[name]` in `folder` and return it. Norms and biases are random too."""
    model_class, config_class, settings, _ = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    model: PreTrainedModel = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    model = model.to(dtype)
    model.save_pretrained(folder, **options)
    return model


def stored(file: FileInfo) -> dict[str, torch.Tensor]:
    """The tensors of a store's file as the safetensors library reads them, without the padding."""
    tensors = safetensors.torch.load_file(file.path)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("__pad_")}


def head_rows(files: tuple[FileInfo, ...]) -> torch.Tensor:
    return torch.cat([stored(file)["head.weight"] for file in files])
