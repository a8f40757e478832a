import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainfed_engine.client import Client
from chainfed_engine.errors import ChainfedError, InvalidArgument, NonFiniteLoss
from chainfed_engine.federation import LocalTransport, RunDirectory, fit, read_adapters
from chainfed_engine.types import Arrays, Batch, Reply, Task
from tests.federation.fake_site import FakeTrainer, clients, config, encoded, run, server_of


def _events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def _same(a: Arrays, b: Arrays) -> bool:
    return a.keys() == b.keys() and all(a[key].tobytes() == b[key].tobytes() for key in a)


def test_a_run_leaves_what_the_next_one_needs(tmp_path: Path) -> None:
    result = run(tmp_path / "run", config())
    arrays, about = read_adapters(tmp_path / "run")
    assert _same(arrays, result.parameters)
    assert (about["rounds"], about["start_layer"], about["task"]) == (12, result.start_layer, "classification")
    assert (tmp_path / "run" / "config.toml").read_text() == "[chain]\n"
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_metrics_tell_the_run_from_the_profile_to_the_last_evaluation(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    result = run(tmp_path / "run", config(), on_event=seen.append)
    events = _events(tmp_path / "run")
    assert [event for event in seen if event["event"] not in ("phase", "step")] == events
    assert events[0]["event"] == "profile" and len(events[0]["cka"]) == 6
    rounds = [event for event in events if event["event"] == "round"]
    assert [event["round"] for event in rounds] == list(range(12))
    for event in rounds:
        assert event["bytes_sent"] == event["bytes_down"] + event["bytes_up"] > 0
        assert event["loss"] > 0 and event["rejected"] == {} and len(event["clients"]) == 3
        assert event["prefix_layers_run"] == 3 and event["steps"] >= 3 and event["rounds"] == 12
        assert {"prepare", "train", "transport", "server"} <= event["seconds"].keys()
        assert event["window"] == [event["window"][0], event["window"][0] + 2]
    assert [event["round"] for event in events if event["event"] == "eval"] == [4, 9, 11]
    assert events[-1]["event"] == "eval" and events[-1]["accuracy"] == result.evaluation["accuracy"]
    assert all(event["peak_rss_bytes"] > 2**20 for event in events if event["event"] == "memory")


def test_an_evaluation_that_falls_on_the_last_round_is_made_once(tmp_path: Path) -> None:
    run(tmp_path / "run", config(rounds=10, eval_every=5))
    assert [event["round"] for event in _events(tmp_path / "run") if event["event"] == "eval"] == [4, 9]


def test_a_run_without_training_is_only_evaluated(tmp_path: Path) -> None:
    run(tmp_path / "run", config(method="none"))
    assert [event["event"] for event in _events(tmp_path / "run")] == ["memory", "eval"]


@pytest.mark.parametrize("method", ["linear-probe", "top-window", "full-adapters"])
def test_the_other_methods_run_through(tmp_path: Path, method: str) -> None:
    run(tmp_path / "run", config(method=method))
    assert not any(event["event"] == "profile" for event in _events(tmp_path / "run"))


def test_the_result_does_not_depend_on_the_order_in_which_clients_work(tmp_path: Path) -> None:
    def shuffled(seed: int) -> Any:
        generator = random.Random(seed)
        return lambda tasks: generator.sample(list(tasks), len(tasks))

    expected = run(tmp_path / "in-order", config()).parameters
    for seed in range(3):
        assert _same(run(tmp_path / f"order-{seed}", config(), order=shuffled(seed)).parameters, expected)


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    assert not _same(run(tmp_path / "a", config()).parameters, run(tmp_path / "b", config(seed=1)).parameters)


class _Diverging(FakeTrainer):
    """Returns NaN for the data of one client, or for everyone's."""

    def __init__(self, client: str) -> None:
        super().__init__()
        self._client = client

    def step(self, batch: Batch) -> float:
        loss = super().step(batch)
        if batch.sample_ids[0].startswith(self._client):
            self.parameters[self.trained_keys[0]] = self.parameters[self.trained_keys[0]] * np.float32(np.nan)
        return loss


def test_a_client_that_diverges_is_left_out_and_harms_no_one(tmp_path: Path) -> None:
    trainer = _Diverging("client-002")
    transport = LocalTransport(clients(4, trainer))
    chain = config(clients_per_round=4, stand_in=False, start_layer=0, probe_rounds=0, refit_rounds=0, norm_limit=0.0)
    with RunDirectory(tmp_path / "run") as directory:
        result = fit(server_of(chain, transport), transport, None, directory)
    assert all(np.isfinite(array).all() for array in result.parameters.values())
    rounds = [event for event in _events(tmp_path / "run") if event["event"] == "round"]
    assert all(list(event["rejected"]) == ["client-002"] for event in rounds)


def test_a_run_in_which_everyone_diverges_stops_with_the_reason_recorded(tmp_path: Path) -> None:
    transport = LocalTransport(clients(4, _Diverging("client")))
    with RunDirectory(tmp_path / "run") as directory, pytest.raises(NonFiniteLoss, match="3 rounds in a row"):
        fit(server_of(config(), transport), transport, None, directory)
    rounds = [event for event in _events(tmp_path / "run") if event["event"] == "round"]
    assert len(rounds) == 3 and all(len(event["rejected"]) == 3 and event["loss"] is None for event in rounds)


def test_an_evaluation_that_fails_says_why(tmp_path: Path) -> None:
    class Unable(FakeTrainer):
        def evaluate(self, *_: Any) -> Any:
            raise ChainfedError("no room")

    transport = LocalTransport(clients(4, FakeTrainer()))
    judge = Client("judge", encoded("judge", 3), Unable())
    with RunDirectory(tmp_path / "run") as directory, pytest.raises(ChainfedError, match=r"after round 4: .*no room"):
        fit(server_of(config(), transport), transport, judge, directory)


def test_clients_have_distinct_names_and_the_transport_knows_whom_it_serves() -> None:
    trainer = FakeTrainer()
    with pytest.raises(InvalidArgument, match="twice"):
        LocalTransport([*clients(2, trainer), *clients(1, trainer)])
    with pytest.raises(InvalidArgument, match="stranger"):
        list(LocalTransport(clients(1, trainer)).exchange([Task("train", "stranger", 0, None)]))


def test_a_transport_that_loses_replies_only_loses_those_clients(tmp_path: Path) -> None:
    class Lossy(LocalTransport):
        def exchange(self, tasks: Sequence[Task]) -> Any:
            replies: list[Reply] = list(super().exchange(tasks))
            return replies[1:]

    transport = Lossy(clients(4, FakeTrainer()))
    with RunDirectory(tmp_path / "run") as directory:
        fit(server_of(config(), transport), transport, None, directory)
    rounds = [event for event in _events(tmp_path / "run") if event["event"] == "round"]
    assert len(rounds) == 12 and all(len(event["clients"]) == 2 for event in rounds)
