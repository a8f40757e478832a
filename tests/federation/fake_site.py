"""A federation without a model: a trainer of microseconds whose updates depend on everything that should matter."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chainfed_engine import classifier_fit, stand_in
from chainfed_engine.client import Client
from chainfed_engine.config import ChainConfig
from chainfed_engine.data import EncodedData
from chainfed_engine.errors import NonFiniteLoss
from chainfed_engine.federation import FitResult, LocalTransport, RunDirectory, fit
from chainfed_engine.server import Server
from chainfed_engine.types import Arrays, Batch, ModelShape, Scalar, Stage, adapter_key, classifier_key

NUM_LAYERS, HIDDEN, RANK, CLASSES = 6, 8, 4, 3
SHAPE = ModelShape("fake", NUM_LAYERS, HIDDEN, 16, 2, 2, 4, 100, 16)


class FakeTrainer:
    """One for all clients, like the real one: what a client leaves behind is there when the next one begins."""

    def __init__(self, num_layers: int = NUM_LAYERS) -> None:
        self.num_layers = num_layers
        self.parameters = initial(num_layers)
        self.trained_keys: list[str] = []
        self.lr = 0.0

    def begin(
        self,
        stage: Stage,
        arrays: Arrays,
        *,
        cache_dir: Path | None,
        lr: float,
        settings: Mapping[str, Scalar] | None = None,
    ) -> None:
        for key, array in arrays.items():
            self.parameters[key] = array.copy()
        prefixes = tuple(f"adapters.{layer}." for layer in stage.window.layers)
        self.trained_keys = [key for key in self.parameters if key.startswith((*prefixes, "classifier."))]
        self.below = [adapter_key(layer, "up_weight") for layer in range(stage.window.start)]
        self.lr = lr

    def prepare(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        return {"prefix_layers_run": 1.0}

    def step(self, batch: Batch) -> float:
        text = " ".join(batch.sample_ids)
        feature = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
        feature += float(sum(self.parameters[key].sum(dtype=np.float64) for key in self.below))
        if not np.isfinite(feature):
            raise NonFiniteLoss("loss became nan")
        for key in self.trained_keys:
            self.parameters[key] -= np.float32(self.lr) * (self.parameters[key] - np.float32(np.sin(feature)))
        return 1.0 + float(np.cos(feature))

    def trained(self) -> Arrays:
        return {key: self.parameters[key] for key in self.trained_keys}

    def end(self) -> None:
        pass

    def profile(
        self,
        batches: Sequence[Batch],
        arrays: Arrays,
        *,
        depths: Collection[int] = (),
        max_rows: int | None = None,
        with_scores: bool = True,
    ) -> Arrays:
        statistics: Arrays = {"cka": np.linspace(0.95, 0.3, self.num_layers)} if with_scores else {}
        for depth in depths:
            x = np.random.default_rng(len(batches[0].sample_ids[0]) + depth).normal(size=(5, HIDDEN)).astype(np.float32)
            statistics.update(stand_in.statistics(depth, x, x[::-1].copy()))
        return statistics

    def classifier_statistics(self, batches: Iterable[Batch], arrays: Arrays) -> tuple[Arrays, float]:
        names = [name for batch in batches for name in batch.sample_ids]
        x = np.random.default_rng(len(names[0])).normal(size=(len(names), HIDDEN)).astype(np.float32)
        return classifier_fit.statistics(x, np.arange(len(names)) % CLASSES, CLASSES), 1.0

    def evaluate(self, batches: Iterable[Batch], arrays: Arrays) -> Mapping[str, float]:
        total = float(sum(array.sum(dtype=np.float64) for array in arrays.values()))
        samples = sum(len(batch.sample_ids) for batch in batches)
        return {"accuracy": 0.5 + 0.5 * float(np.sin(total)), "num_samples": float(samples)}


def initial(num_layers: int = NUM_LAYERS) -> Arrays:
    arrays: Arrays = {}
    for layer in range(num_layers):
        arrays[adapter_key(layer, "down_weight")] = np.full((RANK, HIDDEN), 0.1, np.float32)
        arrays[adapter_key(layer, "down_bias")] = np.zeros(RANK, np.float32)
        arrays[adapter_key(layer, "up_weight")] = np.zeros((HIDDEN, RANK), np.float32)
        arrays[adapter_key(layer, "up_bias")] = np.zeros(HIDDEN, np.float32)
    arrays[classifier_key("out_weight")] = np.zeros((CLASSES, HIDDEN), np.float32)
    arrays[classifier_key("out_bias")] = np.zeros(CLASSES, np.float32)
    return arrays


def encoded(name: str, num_samples: int) -> EncodedData:
    return EncodedData(
        input_ids=[np.arange(1 + index % 5, dtype=np.int32) for index in range(num_samples)],
        labels=np.zeros(num_samples, np.int64),
        sample_ids=[f"{name}-{index}" for index in range(num_samples)],
        rows=np.arange(num_samples, dtype=np.int64),
    )


def config(**fields: Any) -> ChainConfig:
    return ChainConfig(
        **{
            "rounds": 12,
            "window": 2,
            "clients_per_round": 3,
            "batch_size": 4,
            "eval_every": 5,
            "lr": 0.1,
            "probe_rounds": 0,
            **fields,
        }
    )


def clients(count: int, trainer: FakeTrainer) -> list[Client]:
    return [Client(f"client-{i:03d}", encoded(f"client-{i:03d}", 3 + i % 7), trainer) for i in range(count)]


def server_of(chain: ChainConfig, transport: LocalTransport) -> Server:
    samples, windows = transport.client_samples, transport.client_windows
    return Server(chain, SHAPE, initial(), samples, "classification", client_windows=windows)


def run(
    path: Path, chain: ChainConfig, *, count: int = 6, resume: bool = False, on_event: Any = None, order: Any = None
) -> FitResult:
    trainer = FakeTrainer()
    transport = LocalTransport(clients(count, trainer), order=order)
    judge = Client("judge", encoded("judge", 9), trainer)
    with RunDirectory(path, config_text="[chain]\n", resume=resume) as directory:
        return fit(server_of(chain, transport), transport, judge, directory, resume=resume, on_event=on_event)
