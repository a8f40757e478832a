import json
import re
from typing import Any

import numpy as np
import pytest

from chainfed_engine import classifier_fit
from chainfed_engine.errors import ConfigError, CorruptFile, InconsistentUpdates
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


def test_whole_sweeps_are_the_beginning_of_a_longer_continuous_chain() -> None:
    constant: dict[str, Any] = {"lr_decay": "none"}
    sweep = 1 + len(range(2, make_server().shape.num_layers))  # of a window of 2 from layer 0
    state = _state_after(3, rounds=6, **constant)
    make_server(rounds=6 + sweep, budget=2**30, eval_every=2, **constant).restore(*state)
    with pytest.raises(ConfigError, match="is 2 now; 3 were run already"):
        make_server(rounds=2, **constant).restore(*state)


@pytest.mark.parametrize(
    ("fields", "added"),
    [
        ({"lr_decay": "none"}, 1),
        ({"lr_decay": "none", "schedule": "train-and-freeze"}, 3),
        ({"lr_decay": "none", "probe_rounds": 1, "refit_rounds": 1}, 3),
        ({"lr_decay": "cosine"}, 3),
    ],
)
def test_a_run_that_gets_more_rounds_than_its_schedule_foresaw_warns_and_goes_on(
    fields: dict[str, Any], added: int
) -> None:
    longer = make_server(rounds=6 + added, **fields)
    with pytest.warns(UserWarning, match=r"rounds was 6 in the saved run and is \d now; the 6 that were run keep"):
        longer.restore(*_state_after(6, rounds=6, **fields))
    assert not longer.done and longer.rounds == 6 + added
    play(longer, rounds=added)
    assert longer.done and longer.setbacks_at_end() is None


def test_rows_given_for_the_end_of_a_shorter_run_do_not_count_once_more_at_the_end_of_a_longer_one() -> None:
    fields: dict[str, Any] = {"probe_rounds": 1, "refit_rounds": 1}
    longer = make_server(rounds=9, **fields)
    with pytest.warns(UserWarning, match="rounds was 6"):
        longer.restore(*_state_after(6, rounds=6, **fields))
    site, answers = Site(longer.client_samples), []
    while not longer.done:
        answers = [site.answer(task) for task in longer.next_tasks()]
        longer.receive(answers)
    factor = classifier_fit.merge([answer.arrays["classifier.factor"] for answer in answers])
    expected = classifier_fit.solve(factor, 3)["classifier.out_weight"]
    np.testing.assert_allclose(longer.parameters()["classifier.out_weight"], expected, rtol=1e-3, atol=1e-4)


def test_a_run_that_is_cut_short_while_it_refits_keeps_the_rows_it_was_given() -> None:
    fields: dict[str, Any] = {"probe_rounds": 1, "refit_rounds": 3}
    state = _state_after(8, rounds=9, **fields)
    shorter = make_server(rounds=8, **fields)
    with pytest.warns(UserWarning, match="rounds was 9"):
        shorter.restore(*state)
    assert np.array_equal(shorter.state()[0]["classifier.factor"], state[0]["classifier.factor"])


def test_rounds_that_change_whether_the_classifier_is_probed_are_refused() -> None:
    with pytest.raises(ConfigError, match="whether some of them probe"):
        make_server(rounds=8, probe_rounds=None).restore(*_saved(make_server(rounds=2, probe_rounds=None)))


def test_a_run_whose_last_rounds_were_rejected_says_so_and_one_without_a_round_fails() -> None:
    server = make_server(rounds=4)
    play(server, rounds=2)
    for _ in range(2):
        server.next_tasks()
        server.receive([])
    said = "no usable update in the last 2 of 4 rounds .*; the parameters are those of round 2"
    assert re.match(said, str(server.setbacks_at_end()))
    again = make_server(rounds=4)
    again.restore(*_saved(server))
    assert again.setbacks_at_end() == server.setbacks_at_end()
    lost = make_server(rounds=1)
    lost.next_tasks()
    lost.receive([])
    with pytest.raises(InconsistentUpdates, match=r"no usable update in any of 1 rounds .*; nothing was trained"):
        lost.setbacks_at_end()


def _state_after(num_rounds: int, **fields: Any) -> Any:
    server = make_server(**fields)
    play(server, rounds=num_rounds)
    return _saved(server)


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
