import json
from typing import Any

import numpy as np
import pytest

from chainfed_engine.errors import ConfigError, CorruptFile
from chainfed_engine.server import Server
from tests.server.server_parts import Site, make_server, play, same_bits


def _saved(server: Server) -> tuple[Any, Any]:
    arrays, record = server.state()
    return {key: array.copy() for key, array in arrays.items()}, json.loads(json.dumps(record))


@pytest.mark.parametrize("probe_rounds", [0, 4])
@pytest.mark.parametrize("killed_after", [0, 1, 3, 5])
def test_a_restored_server_ends_with_the_same_bits(killed_after: int, probe_rounds: int) -> None:
    whole = make_server(rounds=6, probe_rounds=probe_rounds, refit_rounds=1)
    play(whole)
    first = make_server(rounds=6, probe_rounds=probe_rounds, refit_rounds=1)
    play(first, rounds=killed_after)
    second = make_server(rounds=6, probe_rounds=probe_rounds, refit_rounds=1)
    second.restore(*_saved(first))
    assert second.round_id == killed_after
    play(second)
    assert same_bits(whole.parameters(), second.parameters())


def test_after_a_restore_clients_are_taken_to_hold_nothing() -> None:
    first = make_server(rounds=6, clients_per_round=5)
    play(first, rounds=2)
    second = make_server(rounds=6, clients_per_round=5)
    second.restore(*_saved(first))
    assert all(task.arrays.keys() == task.versions.keys() for task in second.next_tasks())


def test_rejected_rounds_are_remembered_and_a_stopped_run_gets_new_chances() -> None:
    first = make_server(rounds=20)
    for _ in range(2):
        first.next_tasks()
        first.receive([])
    second = make_server(rounds=20)
    second.restore(*_saved(first))
    second.next_tasks()
    second.receive([])
    with pytest.raises(Exception, match="3 rounds in a row"):
        second.next_tasks()
    third = make_server(rounds=20)
    third.restore(*_saved(second))
    assert third.next_tasks()


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"lr": 0.5}, "lr"), ({"seed": 9}, "seed"), ({"window": 3}, "window"), ({"method": "top-window"}, "method")],
)
def test_another_configuration_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    saved = _saved(make_server())
    with pytest.raises(ConfigError, match=f"resume: {named} was"):
        make_server(**fields).restore(*saved)


def test_other_clients_or_another_model_are_refused() -> None:
    saved = _saved(make_server())
    with pytest.raises(ConfigError, match="clients"):
        make_server(samples={"a": 3}).restore(*saved)
    with pytest.raises(ConfigError, match="model"):
        make_server(num_layers=5).restore(*saved)


def test_whole_sweeps_continue_a_continuous_chain_and_nothing_a_shared_out_one() -> None:
    constant: dict[str, Any] = {"lr_decay": "none"}
    state = _saved(make_server(rounds=6, **constant))
    sweep = 1 + len(range(2, make_server().shape.num_layers))  # of a window of 2 from layer 0
    make_server(rounds=6 + sweep, budget=2**30, eval_every=2, **constant).restore(*state)
    with pytest.raises(ConfigError, match=f"whole sweeps of {sweep} rounds, to {6 + sweep}"):
        make_server(rounds=7 + sweep, **constant).restore(*state)
    with pytest.raises(ConfigError, match="rounds"):
        shared: dict[str, Any] = {"schedule": "train-and-freeze", **constant}
        make_server(rounds=9, **shared).restore(*_saved(make_server(**shared)))
    refitted: dict[str, Any] = {"probe_rounds": 1, "refit_rounds": 1, **constant}
    with pytest.raises(ConfigError, match="refit_rounds"):
        make_server(rounds=6 + sweep, **refitted).restore(*_saved(make_server(rounds=6, **refitted)))


def _damage(arrays: Any, record: Any, what: str) -> None:
    key = "adapters.0.up_weight"
    match what:
        case "no record":
            record.clear()
        case "a newer version":
            record["version"] += 1
        case "a negative round":
            record["progress"]["round_id"] = -1
        case "a round that is text":
            record["progress"]["round_id"] = "3"
        case "a progress field missing":
            del record["progress"]["rejections"]
        case "another start layer":
            record["progress"]["start_layer"] = None
        case "a list for a configuration":
            record["run"]["config"] = []
        case "a key missing":
            del arrays[key]
        case "a key too many":
            arrays["adapters.77.up_weight"] = arrays[key]
        case "a shape":
            arrays[key] = arrays[key].T.copy()
        case "NaN":
            arrays[key] = arrays[key] * np.float32(np.nan)
        case "a stand-in nobody asked for":
            arrays["stand_in.2.bias"] = np.zeros(4, np.float32)


@pytest.mark.parametrize(
    "what",
    [
        "no record",
        "a newer version",
        "a negative round",
        "a round that is text",
        "a progress field missing",
        "another start layer",
        "a list for a configuration",
        "a key missing",
        "a key too many",
        "a shape",
        "NaN",
        "a stand-in nobody asked for",
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(what: str) -> None:
    first = make_server()
    play(first, rounds=2)
    arrays, record = _saved(first)
    _damage(arrays, record, what)
    server = make_server()
    before = server.parameters()
    with pytest.raises(CorruptFile):
        server.restore(arrays, record)
    assert server.round_id == 0
    assert same_bits(before, server.parameters())


def test_saving_changes_nothing_and_shares_no_later_change() -> None:
    server = make_server()
    site = Site(server.client_samples)
    arrays, record = server.state()
    before = {key: array.copy() for key, array in arrays.items()}
    server.receive([site.answer(task) for task in server.next_tasks()])
    assert same_bits(arrays, before)
    assert record["progress"]["round_id"] == 0


def test_a_run_whose_rate_decays_over_its_rounds_cannot_get_more_of_them() -> None:
    first = make_server(rounds=6, lr_decay="cosine")
    play(first, rounds=3)
    with pytest.raises(ConfigError, match="rounds was 6 in the saved run and is 8 now; lr_decay"):
        make_server(rounds=8, lr_decay="cosine").restore(*_saved(first))
