"""Three hundred clients that learn something, and a transport on which everything goes wrong that can.

The task: softmax regression on shared random features; its classifier is what a federation trains, so that accuracy is
worth something and a poisoned round shows. Faults are drawn from (seed, round, client): a run is repeatable.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from chainfed_engine.client import Client
from chainfed_engine.federation import LocalTransport
from chainfed_engine.types import Arrays, Batch, Reply, Task
from tests.federation.fake_site import CLASSES, HIDDEN, FakeTrainer, encoded

_DIRECTIONS = np.random.default_rng(11).normal(size=(CLASSES, HIDDEN))


class LearningTrainer(FakeTrainer):
    """Trains classifier.out_weight and out_bias on features drawn from the sample's id; adapters as its base does."""

    def step(self, batch: Batch) -> float:
        weight, bias = (self.parameters[f"classifier.out_{name}"].copy() for name in ("weight", "bias"))
        super().step(batch)
        self.parameters |= {"classifier.out_weight": weight, "classifier.out_bias": bias}
        features, labels = _samples(batch.sample_ids)
        probabilities = _softmax(features @ weight.T + bias)
        loss = -float(np.mean(np.log(probabilities[np.arange(len(labels)), labels] + 1e-9)))
        probabilities[np.arange(len(labels)), labels] -= 1
        weight -= np.float32(self.lr) * (probabilities.T @ features / len(labels)).astype(np.float32)
        bias -= np.float32(self.lr) * probabilities.mean(axis=0).astype(np.float32)
        return loss

    def evaluate(self, batches: Iterable[Batch], arrays: Arrays) -> Mapping[str, float]:
        hits = total = 0
        for batch in batches:
            features, labels = _samples(batch.sample_ids)
            scores = features @ arrays["classifier.out_weight"].T + arrays["classifier.out_bias"]
            hits += int((scores.argmax(axis=1) == labels).sum())
            total += len(labels)
        return {"accuracy": hits / total, "num_samples": float(total)}


@dataclass(frozen=True)
class Faults:
    """Shares of the replies of a round."""

    dropped: float = 0.3
    not_a_number: float = 0.05
    scaled: float = 0.05
    twice: float = 0.1
    delayed: float = 0.05  # by one to three exchanges


class ChaoticTransport(LocalTransport):
    def __init__(self, clients: Iterable[Client], faults: Faults, *, seed: int = 3) -> None:
        super().__init__(clients)
        self._faults, self._seed = faults, seed
        self._late: list[tuple[int, Reply]] = []
        self._exchange = 0
        self.counts = dict.fromkeys(("dropped", "not_a_number", "scaled", "twice", "delayed"), 0)
        self.liars: dict[int, set[str]] = {}

    def exchange(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        self._exchange += 1
        due = [reply for when, reply in self._late if when <= self._exchange]
        self._late = [(when, reply) for when, reply in self._late if when > self._exchange]
        yield from due
        for reply in super().exchange(tasks):
            yield from self._disturb(reply)

    def _disturb(self, reply: Reply) -> Iterator[Reply]:
        generator = np.random.default_rng([self._seed, self._exchange, int(reply.client.rsplit("-", 1)[1])])
        draw, faults = generator.random(), self._faults
        for name in ("dropped", "not_a_number", "scaled", "delayed", "twice"):
            share = getattr(faults, name)
            if reply.kind == "profile" and name in ("not_a_number", "scaled"):
                continue
            if draw < share:
                self.counts[name] += 1
                break
            draw -= share
        else:
            name = ""
        match name:
            case "dropped":
                return
            case "delayed":
                self._late.append((self._exchange + int(generator.integers(1, 4)), reply))
            case "not_a_number" | "scaled":
                self.liars.setdefault(reply.round_id, set()).add(reply.client)
                factor = np.float32("nan") if name == "not_a_number" else np.float32(1000)
                arrays = {
                    key: array * factor if array.dtype == np.float32 else array for key, array in reply.arrays.items()
                }
                yield replace(reply, arrays=arrays)
            case "twice":
                yield reply
                yield reply
            case _:
                yield reply


def learners(count: int, trainer: FakeTrainer) -> list[Client]:
    return [Client(f"client-{i:03d}", encoded(f"client-{i:03d}", 4 + i % 9), trainer) for i in range(count)]


def _samples(sample_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    rows: list[Any] = [_sample(name) for name in sample_ids]
    return np.stack([row[0] for row in rows]), np.array([row[1] for row in rows])


@cache
def _sample(name: str) -> tuple[np.ndarray, int]:
    seed = int.from_bytes(name.encode(), "big") % 2**64
    generator = np.random.default_rng(seed)
    features = generator.normal(size=HIDDEN)
    noisy = _DIRECTIONS @ features + generator.normal(scale=0.3, size=CLASSES)
    return features, int(noisy.argmax())


def _softmax(scores: np.ndarray) -> np.ndarray:
    exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))
