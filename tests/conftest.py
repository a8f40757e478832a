"""Tiny random checkpoints of every family, saved by transformers and converted to layer stores."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As the program does, before torch is imported: OpenMP threads that spin after their work keep the core's threads off
# the processors, which on two of them takes four times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
import torch
import transformers

from chainfed_engine.model.convert import convert
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.store import LayerStore
from chainfed_engine.types import Batch

SIZES = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
DISTIL = {"vocab_size": 211, "dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4}
DECODER = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

# name -> (config class, config values)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**SIZES, "max_position_embeddings": 40}),
    "roberta": ("Roberta", {**SIZES, "max_position_embeddings": 42, "type_vocab_size": 1}),
    "distilbert": ("DistilBert", {**DISTIL, "max_position_embeddings": 40}),
    "llama": ("Llama", {**DECODER, "tie_word_embeddings": False}),
    "llama-tied": ("Llama", {**DECODER, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {**DECODER, "attention_bias": True, "mlp_bias": True}),
    "llama-3.1": (
        "Llama",
        {**DECODER, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}, "head_dim": 24},
    ),
    "mistral": ("Mistral", {**DECODER, "sliding_window": None}),
    "mistral-sliding": ("Mistral", {**DECODER, "sliding_window": 5}),
    "qwen2": ("Qwen2", {**DECODER, "tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2", {**DECODER, **SLIDING}),
    "qwen3": ("Qwen3", {**DECODER, "head_dim": 24}),
    "qwen3-sliding": ("Qwen3", {**DECODER, "head_dim": 24, **SLIDING, "tie_word_embeddings": True}),
}
ENCODERS = ("bert", "roberta", "distilbert")
DECODERS = tuple(name for name in CONFIGS if name not in ENCODERS)


@dataclass
class Checkpoint:
    """`reference` in f32 and evaluation mode; `path` its store."""

    reference: Any
    path: Path

    def open(self, activation: Any = None, **options: Any) -> FrozenModel:
        return FrozenModel(LayerStore.open(self.path, **options), activation)


def randomise(model: torch.nn.Module) -> None:
    """Weights large enough that attention, biases and norms matter; the library's own start hides mistakes in them."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(0.0, 0.15, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """checkpoint(name, head, block_format): made once a session. `head`: the end of transformers' class name."""
    made: dict[tuple[str, str, str], Checkpoint] = {}

    def make(name: str, head: str = "Model", block_format: str = "f32") -> Checkpoint:
        key = (name, head, block_format)
        if key not in made:
            family, values = CONFIGS[name]
            config = getattr(transformers, f"{family}Config")(**values, num_labels=3)
            config._attn_implementation = "sdpa"
            reference = getattr(transformers, f"{family}{head}")(config).eval()
            randomise(reference)
            folder = tmp_path_factory.mktemp(name)
            reference.save_pretrained(folder / "checkpoint")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).*no tokenizer")
                store = convert(folder / "checkpoint", folder / "store", block_format=block_format)
            made[key] = Checkpoint(reference, store)
        return made[key]

    return make


@pytest.fixture
def padded_batch() -> Batch:
    """Odd lengths, one of a single token, random ids above the special ones; RoBERTa's padding id in the padding."""
    return make_batch([17, 9, 1, 12])


def make_batch(lengths: list[int], seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 211, mask.shape, generator=generator)
    names = [f"sample {index}" for index in range(len(lengths))]
    return Batch(ids * mask + (1 - mask), mask, None, names)


def inputs(batch: Batch, pad_token_id: int = 1) -> dict[str, torch.Tensor]:
    """What transformers' models take; Llama-like classifiers find the last token by the padding id."""
    ids = torch.where(batch.attention_mask.bool(), batch.input_ids, pad_token_id)
    return {"input_ids": ids, "attention_mask": batch.attention_mask}


def streamed(model: FrozenModel, batch: Batch) -> torch.Tensor:
    """The final hidden state after the final norm, layer by layer."""
    hidden, context = model.embed(batch), model.context(batch)
    for index in range(model.num_layers):
        hidden = model.run_layer(index, hidden, context)
    return model.final_norm(hidden)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).detach().norm() / wanted.detach().norm())
