"""A federation over machines without a network: sites with stores and data of their own, and a courier between."""

import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from chainfed_engine.config_file import load_config
from chainfed_engine.federation.site import Site
from chainfed_engine.federation.transport_flower import Delivery, Node
from chainfed_engine.model.synth import synth

SHAPE = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}
CONFIG = """
[model]
store = "store"
[data]
train = "{train}"
eval = "{evaluation}"
text = "text"
label = "label"
client = "{client}"
[chain]
window = 2
start_layer = 0
rounds = {rounds}
adapter_size = 4
[train]
batch_size = 4
sequence_length = 16
lr = 0.01
[federation]
clients_per_round = 2
deadline_seconds = {deadline}
"""
SITES = ("clinic", "hospital", "practice")


def make_files(root: Path, *, rounds: int = 3, deadline: float = 60.0) -> None:
    """A store, one table of all sites and one each, and configurations: all.toml, serve.toml, NAME.toml."""
    (root / "shape.json").write_text(json.dumps(SHAPE))
    synth(str(root / "shape.json"), root / "store", block_format="int4")
    generator = random.Random(5)
    tables = {name: _rows(generator, name, 9 + index) for index, name in enumerate(SITES)}
    for name, rows in tables.items():
        _write(root / f"{name}.csv", rows)
    _write(root / "all.csv", [{**row, "client": name} for name, rows in tables.items() for row in rows])
    _write(root / "eval.csv", _rows(generator, "eval", 12))
    given = {"rounds": rounds, "deadline": deadline}
    (root / "all.toml").write_text(CONFIG.format(train="all.csv", evaluation="eval.csv", client="client", **given))
    text = CONFIG.replace('client = "{client}"\n', "")
    (root / "serve.toml").write_text(text.format(train="at the sites", evaluation="eval.csv", **given))
    for name in SITES:
        (root / f"{name}.toml").write_text(text.format(train=f"{name}.csv", evaluation="none", **given))


def site(root: Path, name: str, folder: str = "sites") -> Site:
    return Site(name, load_config(root / f"{name}.toml"), root / folder / name)


class DirectCourier:
    """Sites in this process. `spoil` may change or drop (None) an answer; `clock` moves by a second a look."""

    def __init__(self, sites: Sequence[Site], *, spoil: Callable[[str, int, bytes, bytes], Any] | None = None) -> None:
        self.sites = {one.name: one for one in sites}
        self.registered = {one.name: one.name for one in sites}  # name of the registration -> site that answers
        self.activations = dict.fromkeys(self.sites, 1)
        self.pushed: list[tuple[str, bytes, bytes]] = []
        self.now = 0.0
        self._spoil = spoil
        self._waiting: dict[str, tuple[str, bytes, bytes]] = {}

    def nodes(self) -> list[Node]:
        return [Node(name, 10 + n, str(self.activations[name])) for n, name in enumerate(self.registered)]

    def push(self, node_id: int, header: bytes, payload: bytes, *, ttl_seconds: float) -> str | None:
        name = list(self.registered)[node_id - 10]
        message_id = f"message-{len(self.pushed)}"
        self.pushed.append((name, header, payload))
        self._waiting[message_id] = (name, header, payload)
        return message_id

    def pull(self, message_ids: Sequence[str]) -> Iterator[Delivery]:
        for message_id in reversed(list(message_ids)):  # any order
            if message_id not in self._waiting:
                continue
            name, header, payload = self._waiting.pop(message_id)
            answered = self.sites[self.registered[name]].answer(header, payload)
            result = answered if self._spoil is None else self._spoil(name, len(self.pushed), *answered)
            if isinstance(result, str):
                yield Delivery(message_id, b"", b"", result, lost=result.startswith("lost"))
            elif result is not None:
                yield Delivery(message_id, *result, None)

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 1.0)


def _rows(generator: random.Random, tag: str, count: int) -> list[dict[str, str]]:
    words = {"good": ["nice", "fine", "warm"], "bad": ["poor", "sad", "cold"]}
    rows = []
    for index in range(count):
        label = ("good", "bad")[index % 2]
        rows.append({"text": f"{tag} {index} {' '.join(generator.choices(words[label], k=3))}", "label": label})
    return rows


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
