import dataclasses
import json
import math
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainfed_engine.errors import ConfigError, CorruptFile, InvalidArgument
from chainfed_engine.federation import RunDirectory
from chainfed_engine.server.privacy import private_average
from chainfed_engine.types import Reply
from tests.federation.fake_site import config, run
from tests.server.server_parts import Site, make_server

KEY = b"k" * 32
PRIVATE: dict[str, Any] = {"start_layer": 0, "stand_in": False, "probe_rounds": 0, "dp_noise": 1.0, "dp_clip": 0.5}


def _average(values: dict[str, list[float]], *, noise: float = 0.0, clip: float = 1.0, asked: int = 2) -> np.ndarray:
    before = {"x": np.array([1.0, 1.0], np.float32)}
    replies = {
        name: Reply("train", name, 0, 7, {"x": before["x"] + np.array(change, np.float32)})
        for name, change in values.items()
    }
    return private_average(replies, before, asked=asked, clip=clip, noise=noise, key=KEY, round_id=3)["x"]


def test_every_clients_change_is_clipped_to_the_bound_and_all_weigh_the_same() -> None:
    assert _average({"a": [300.0, 400.0], "b": [0.0, 0.0]}).tolist() == pytest.approx([1.3, 1.4])
    assert _average({"a": [0.3, 0.4], "b": [0.0, 0.0]}).tolist() == pytest.approx([1.15, 1.2])


def test_the_sum_is_divided_by_those_asked_whoever_answered() -> None:
    assert _average({"a": [0.6, 0.8]}, asked=4).tolist() == pytest.approx([1.15, 1.2])


def test_noise_has_the_promised_size_and_a_key_of_its_own() -> None:
    before = {"x": np.zeros(40_000, np.float32), "y": np.zeros(40_000, np.float32)}
    drawn = private_average({}, before, asked=5, clip=0.5, noise=2.0, key=KEY, round_id=1)
    assert np.std(drawn["x"]) == pytest.approx(2.0 * 0.5 / 5, rel=0.02)
    assert abs(np.corrcoef(drawn["x"], drawn["y"])[0, 1]) < 0.02
    for other in ({"key": b"j" * 32}, {"round_id": 2}):
        again = private_average(
            {}, before, **{"asked": 5, "clip": 0.5, "noise": 2.0, "key": KEY, "round_id": 1, **other}
        )
        assert abs(np.corrcoef(drawn["x"], again["x"])[0, 1]) < 0.02


def test_a_scaled_update_moves_a_private_model_no_further_than_the_clip() -> None:
    server = make_server(**PRIVATE, clients_per_round=5)
    server.combiner.noise_key = KEY
    other = make_server(**PRIVATE, clients_per_round=5)
    other.combiner.noise_key = KEY
    site = Site(server.client_samples)
    replies = [site.answer(task) for task in server.next_tasks()]
    other.next_tasks()
    huge = {key: array * np.float32(1e6) for key, array in replies[0].arrays.items()}
    assert server.receive([dataclasses.replace(replies[0], arrays=huge), *replies[1:]]).rejected == {}
    other.receive(replies)
    moved = sum(
        float(np.sum((server.parameters()[key].astype(np.float64) - other.parameters()[key]) ** 2)) for key in huge
    )
    assert math.sqrt(moved) <= 2 * 0.5 / 5 + 1e-5


@pytest.mark.parametrize(
    "fields",
    [{"start_layer": None}, {"stand_in": True}, {"aggregation": "median"}, {"method": "flora", "adapter": "lora"}],
)
def test_what_would_leak_beside_the_noise_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"dp_noise|lora"):
        make_server(**{**PRIVATE, **fields})


def test_without_a_key_there_is_no_private_round() -> None:
    server = make_server(**PRIVATE)
    site = Site(server.client_samples)
    with pytest.raises(InvalidArgument, match="noise key"):
        server.receive([site.answer(task) for task in server.next_tasks()])


def test_the_noise_key_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as directory:
        key = directory.noise_key()
        assert directory.noise_key() == key and len(key) == 32
        path = tmp_path / "run" / "state" / "noise.key"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.write_bytes(key[:5])
        with pytest.raises(CorruptFile, match="32 bytes"):
            directory.noise_key()


def test_a_private_run_says_what_it_has_spent_and_ends_the_same_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chainfed_engine.federation.run_directory.secrets.token_bytes", lambda count: KEY[:count])
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (extra `privacy`)")
    whole = run(tmp_path / "whole", config(**PRIVATE))
    rounds = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    spent = [event["epsilon"] for event in rounds if event["event"] == "round"]
    assert len(spent) == 12 and spent == sorted(spent) and 0 < spent[0] < spent[-1]

    class Stop(Exception):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "memory" and event["round"] == 6:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "cut", config(**PRIVATE), on_event=stop)
    resumed = run(tmp_path / "cut", config(**PRIVATE), resume=True)
    assert all(resumed.parameters[key].tobytes() == array.tobytes() for key, array in whole.parameters.items())
    monkeypatch.undo()
    other = run(tmp_path / "other", config(**PRIVATE))
    assert any(other.parameters[key].tobytes() != array.tobytes() for key, array in whole.parameters.items())


def test_epsilon_of_one_full_round_is_that_of_the_gaussian_mechanism() -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (extra `privacy`)")
    from chainfed_engine.federation.privacy import epsilon

    chain = config(**{**PRIVATE, "dp_noise": 20.0, "clients_per_round": 10})
    one = epsilon(chain, num_clients=10, rounds=1)
    # Renyi bound of a Gaussian of multiplier 10 at 1e-5: no more than sqrt(2 ln(1.25 / delta)) / 10 = 0.48.
    assert one is not None and 0.3 < one < 0.5
    sampled = epsilon(config(**{**PRIVATE, "dp_noise": 20.0}), num_clients=300, rounds=1)
    assert sampled is not None and sampled < one / 3
    assert epsilon(config(), num_clients=10, rounds=5) is None
