"""Small models, servers and replies that the server's tests share."""

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from chainfed_engine import classifier_fit, stand_in
from chainfed_engine.config import ChainConfig
from chainfed_engine.server import Server, Summary
from chainfed_engine.types import Arrays, ModelShape, Reply, Task, adapter_key, classifier_key
from chainfed_engine.update_format import CODES, SCALES, unpacked

HIDDEN, RANK = 4, 2


def shape(num_layers: int = 4) -> ModelShape:
    return ModelShape("fake", num_layers, HIDDEN, 8, 2, 2, 2, 100, 16)


def initial(num_layers: int = 4, *, classes: int | None = 3) -> Arrays:
    """Untrained adapters: random down, zero up; a zero classifier of `classes`, or none."""
    generator = np.random.default_rng(5)
    arrays: Arrays = {}
    for layer in range(num_layers):
        arrays[adapter_key(layer, "down_weight")] = generator.normal(size=(RANK, HIDDEN)).astype(np.float32)
        arrays[adapter_key(layer, "down_bias")] = np.zeros(RANK, np.float32)
        arrays[adapter_key(layer, "up_weight")] = np.zeros((HIDDEN, RANK), np.float32)
        arrays[adapter_key(layer, "up_bias")] = np.zeros(HIDDEN, np.float32)
    if classes:
        arrays[classifier_key("out_weight")] = np.zeros((classes, HIDDEN), np.float32)
        arrays[classifier_key("out_bias")] = np.zeros(classes, np.float32)
    return arrays


def make_server(
    *, num_layers: int = 4, samples: dict[str, int] | None = None, task: str = "classification", **fields: Any
) -> Server:
    """A chain that starts at layer 0 without profiling, unless `fields` say otherwise."""
    fields = {
        "window": 2,
        "start_layer": 0,
        "stand_in": False,
        "probe_rounds": 0,
        "rounds": 6,
        "clients_per_round": 3,
        "update_format": "f32",
        **fields,
    }
    clients = samples or {f"client-{index}": 10 + index for index in range(5)}
    classes = 3 if task == "classification" else None
    return Server(ChainConfig(**fields), shape(num_layers), initial(num_layers, classes=classes), clients, task)  # type: ignore[arg-type]


def trained_keys(task: Task) -> list[str]:
    assert task.stage is not None
    prefixes = tuple(f"adapters.{layer}." for layer in task.stage.window.layers)
    names = [key.removesuffix(CODES) for key in task.versions if not key.endswith(SCALES)]
    return [key for key in names if key.startswith((*prefixes, "classifier."))]


def stand_in_rows(task: Task, num_samples: int) -> Reply:
    """An honest profile without scores: y = 2 x at every depth asked for."""
    x = np.random.default_rng(int(task.settings["seed"])).normal(size=(6, HIDDEN)).astype(np.float32)
    depths = range(int(task.settings["depth_start"]), int(task.settings["depth_stop"]))
    arrays = {key: rows for depth in depths for key, rows in stand_in.statistics(depth, x, 2 * x).items()}
    return Reply("profile", task.client, task.round_id, num_samples, arrays)


class Site:
    """Clients as the server sees them: they hold what they were sent and answer deterministic updates."""

    def __init__(self, samples: dict[str, int]) -> None:
        self.samples = samples
        self.held: dict[str, Arrays] = {name: {} for name in samples}

    def answer(self, task: Task) -> Reply:
        held = self.held[task.client]
        held.update(task.arrays)
        assert task.versions.keys() <= held.keys(), "the server believes in something the client was never sent"
        values = unpacked({key: held[key] for key in task.versions})
        generator = np.random.default_rng(int(task.settings["seed"]))
        if task.settings["closed_form"]:
            x = generator.normal(size=(int(task.settings["num_rows"]), HIDDEN))
            statistics = classifier_fit.statistics(x, (x[:, 0] > 0).astype(np.int64), 3)
            return Reply(
                "train",
                task.client,
                task.round_id,
                self.samples[task.client],
                statistics,
                {"loss": 1.0},
                stage=task.stage,
            )
        arrays = {}
        for key in trained_keys(task):
            if key.startswith("classifier.") and not task.settings["trains_classifier"]:
                continue
            arrays[key] = values[key] + generator.normal(size=values[key].shape).astype(np.float32)
        return Reply(
            "train", task.client, task.round_id, self.samples[task.client], arrays, {"loss": 1.0}, stage=task.stage
        )


def play(server: Server, *, rounds: int | None = None, site: Site | None = None) -> list[Summary]:
    """Run up to `rounds` rounds with honest clients."""
    site = site or _site_of(server)
    summaries: list[Summary] = []
    while not server.done and (rounds is None or len(summaries) < rounds):
        summaries.append(server.receive([site.answer(task) for task in server.next_tasks()]))
    return summaries


def _site_of(server: Server) -> Site:
    """One site a server: what it was sent in an earlier call is still held."""
    return _SITES.setdefault(server, Site(server.client_samples))


_SITES: "WeakKeyDictionary[Server, Site]" = WeakKeyDictionary()


def same_bits(a: Arrays, b: Arrays) -> bool:
    return a.keys() == b.keys() and all(a[key].tobytes() == b[key].tobytes() for key in a)


def changed_keys(before: Arrays, after: Arrays) -> set[str]:
    return {key for key in before if before[key].tobytes() != after[key].tobytes()}
