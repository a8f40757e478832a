"""Everything goes wrong at once and the model is as good as if nothing had. Short here; `make soak` for the whole."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest

from chainfed_engine.client import Client
from chainfed_engine.federation import LocalTransport, RunDirectory, fit
from tests.federation.chaos import ChaoticTransport, Faults, LearningTrainer, learners
from tests.federation.fake_site import config, encoded, server_of

PER_ROUND = 50
FULL = os.environ.get("CHAINFED_SOAK") == "full"
CLIENTS, ROUNDS, MEMORY_ROUNDS = (300, 100, 300) if FULL else (300, 24, 30)


def _run(path: Path, transport: LocalTransport, **fields: Any) -> tuple[float, list[dict[str, Any]]]:
    chain = config(
        **{"rounds": ROUNDS, "clients_per_round": PER_ROUND, "lr": 0.3, "eval_every": 0, "start_layer": 0, **fields}
    )
    judge = Client("judge", encoded("judge", 2000), LearningTrainer())
    with RunDirectory(path) as directory:
        result = fit(server_of(chain, transport), transport, judge, directory)
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    accuracy = result.evaluation["accuracy"]
    assert accuracy is not None
    return accuracy, [event for event in events if event["event"] == "round"]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> float:
    path = tmp_path_factory.mktemp("calm") / "run"
    accuracy, _ = _run(path, LocalTransport(learners(CLIENTS, LearningTrainer())))
    assert accuracy > 0.8
    return accuracy


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("aggregation", ["mean", "median", "trimmed-mean", "multi-krum"])
def test_a_tenth_of_liars_and_a_third_of_drop_outs_cost_less_than_a_point(
    calm: float, tmp_path: Path, aggregation: str
) -> None:
    transport = ChaoticTransport(learners(CLIENTS, LearningTrainer()), Faults())
    accuracy, rounds = _run(tmp_path / "run", transport, aggregation=aggregation)
    assert abs(accuracy - calm) <= 0.01, f"{accuracy} after chaos, {calm} without"
    assert len(rounds) == ROUNDS and all(event["accepted"] for event in rounds)
    assert all(count > 0 for count in transport.counts.values()), transport.counts
    for event in rounds:
        liars = transport.liars.get(event["round"], set())
        assert not liars & set(event["clients"])
        assert liars <= event["rejected"].keys()
        honest = {client: reason for client, reason in event["rejected"].items() if client not in liars}
        assert all(reason.startswith("multi-krum") for reason in honest.values()), honest
    assert sum(event["late"] for event in rounds) > 0
    print(f"{aggregation}: {accuracy:.4f}, calm {calm:.4f}, faults {transport.counts}")


def test_without_the_quarantine_the_same_liars_poison_the_model(calm: float, tmp_path: Path) -> None:
    transport = ChaoticTransport(learners(CLIENTS, LearningTrainer()), Faults())
    accuracy, _ = _run(tmp_path / "run", transport, norm_limit=0.0, rounds=12)
    assert accuracy < calm - 0.03


@pytest.mark.timeout(1800)
def test_memory_is_flat(tmp_path: Path) -> None:
    from chainfed_engine.memory.meter import rss_bytes

    transport = ChaoticTransport(learners(CLIENTS, LearningTrainer()), Faults())
    chain = config(rounds=MEMORY_ROUNDS, clients_per_round=PER_ROUND, lr=0.3, eval_every=0, start_layer=0)
    seen: dict[int, int] = {}

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "memory" and event["round"] in (9, MEMORY_ROUNDS - 1):
            gc.collect()
            seen[event["round"]] = rss_bytes()

    with RunDirectory(tmp_path / "run") as directory:
        fit(server_of(chain, transport), transport, None, directory, on_event=on_event)
    ratio = seen[MEMORY_ROUNDS - 1] / seen[9]
    print(f"resident memory after {MEMORY_ROUNDS} rounds over after 10: {ratio:.4f}")
    assert ratio <= 1.01
