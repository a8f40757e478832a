"""A store of three small layers, two data sets of two classes, and a study over them."""

import json
from pathlib import Path

import pytest

from chainfed_engine.model.synth import synth
from tests.small_bert import SMALL_BERT

STUDY = """
[study]
methods = ["chain", "everything at once"]
seeds = [0, 1]
reference = "everything at once"

[run.model]
store = "store"
[run.chain]
rounds = 2
window = 1
start_layer = 1
adapter_size = 4
[run.train]
batch_size = 4
sequence_length = 16
lr = 0.01
[run.federation]
eval_every = 1
clients_per_round = 2

[data.films]
train = "films.jsonl"
eval = "held_out.jsonl"
label = "label"

[data.by-site]
train = "films.jsonl"
eval = "held_out.jsonl"
label = "label"
client = "site"

[partition.even]
partition = "iid"
num_clients = 3
[partition.skewed]
partition = "dirichlet"
alpha = 0.1
num_clients = 3

[method."everything at once"]
method = "full-adapters"
[method."everything at once".run.train]
lr = 0.02
"""


def write_rows(path: Path, count: int, labels: tuple[str, ...] = ("good", "bad")) -> None:
    rows = [
        {"text": f"{labels[i % len(labels)]} film {i}", "label": labels[i % len(labels)], "site": f"s{i % 3}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """study.toml and its data; no store."""
    write_rows(tmp_path / "films.jsonl", 18)
    write_rows(tmp_path / "held_out.jsonl", 6)
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth(SMALL_BERT, tmp_path_factory.mktemp("study") / "store", "int4")
