import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest

from chainfed_engine import stand_in
from chainfed_engine.client.held import HeldParameters
from chainfed_engine.errors import NonFiniteLoss
from chainfed_engine.server import Server
from chainfed_engine.stand_in import depths_at_once, rows_in_all
from chainfed_engine.types import Arrays, Reply, Task
from chainfed_engine.update_format import halved
from tests.server.server_parts import HIDDEN, Site, make_server, play, same_bits

SCORES = np.array([0.95, 0.9, 0.7, 0.5, 0.3, 0.2])


def _server(**fields: Any) -> Server:
    return make_server(
        **{"num_layers": 6, "window": 2, "start_layer": None, "stand_in": True, "profile_clients": 3, **fields}
    )


def _answer(server: Server, task: Task) -> Reply:
    generator = np.random.default_rng(int(task.settings["seed"]))
    scores = SCORES + generator.normal(size=6) * 1e-3
    arrays: Arrays = {"cka": scores} if task.settings["with_scores"] else {}
    for depth in range(int(task.settings["depth_start"]), int(task.settings["depth_stop"])):
        x = generator.normal(size=(6, HIDDEN)).astype(np.float32)
        arrays.update(stand_in.statistics(depth, x, 2 * x + 1))
    return Reply("profile", task.client, task.round_id, server.client_samples[task.client], arrays)


def _profile(server: Server) -> list[Reply]:
    return [_answer(server, task) for task in server.next_tasks()]


def test_the_chain_starts_at_the_first_layer_whose_mean_score_is_below_the_threshold() -> None:
    server = _server(threshold=0.8)
    assert server.start_layer is None
    replies = _profile(server)
    summary = server.receive(replies)
    assert (summary.kind, summary.start_layer, server.start_layer, server.round_id) == ("profile", 2, 2, 0)
    weights = [reply.num_samples for reply in replies]
    expected = np.average([reply.arrays["cka"] for reply in replies], axis=0, weights=weights)
    np.testing.assert_allclose(summary.scores, expected, rtol=1e-12)
    assert summary.bytes_up == sum(array.nbytes for reply in replies for array in reply.arrays.values())


def test_rows_for_stand_ins_may_come_in_sixteen_bits_where_that_was_asked_for() -> None:
    fitted = []
    for travels in ("f32", "int8"):
        server = _server(update_format=travels, start_layer=1, rounds=8)
        tasks = server.next_tasks()
        assert {task.settings["update_format"] for task in tasks} == {travels}
        halves = [dataclasses.replace(reply, arrays=halved(reply.arrays)) for reply in _profile(server)]
        summary = server.receive(halves)
        assert summary.accepted == (travels == "int8")
        assert travels == "int8" or all("expected float32" in reason for reason in summary.rejected.values())
        fitted.append({key: array for key, array in server.state()[0].items() if key.startswith("stand_in.")})
    assert not fitted[0]
    np.testing.assert_allclose(fitted[1]["stand_in.3.weight"], 2 * np.eye(HIDDEN), atol=0.02)


def test_a_fixed_start_layer_is_kept_and_profiled_only_for_the_stand_ins() -> None:
    server = _server(start_layer=1, window=2, rounds=8)
    tasks = server.next_tasks()
    assert (tasks[0].settings["depth_start"], tasks[0].settings["depth_stop"]) == (3, 6)
    assert not tasks[0].settings["with_scores"]
    assert server.receive([_answer(server, task) for task in tasks]).start_layer == 1
    assert make_server(start_layer=1).next_tasks()[0].kind == "train"


def test_few_clients_make_up_with_more_batches_each() -> None:
    assert [task.settings["num_batches"] for task in _server(start_layer=2).next_tasks()] == [6, 6, 6]
    assert _server().next_tasks()[0].settings["num_batches"] == 1


def test_statistics_are_asked_for_a_few_depths_at_a_time_right_before_the_first_round_that_needs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chainfed_engine.stand_in.depths_at_once", lambda hidden_size: 2)
    server = _server(start_layer=0, window=1, rounds=12, samples={"a": 5}, profile_clients=1, clients_per_round=1)
    steps: list[tuple[int, int] | int] = []
    while not server.done:
        (task,) = server.next_tasks()
        if task.kind == "profile":
            steps.append((int(task.settings["depth_start"]), int(task.settings["depth_stop"])))
            server.receive([_answer(server, task)])
        else:
            assert task.stage is not None
            steps.append(task.stage.window.stop)
            trained = {k: a for k, a in server.parameters().items() if k.startswith(_trained(task))}
            server.receive([Reply("train", "a", task.round_id, 5, trained, {"loss": 1.0}, stage=task.stage)])
    assert steps == [(1, 3), 1, 2, (3, 5), 3, 4, (5, 6), 5, 6, 1, 2, 3, 4, 5, 6]


def test_a_wide_model_gives_one_depth_and_few_rows_at_a_time() -> None:
    assert (depths_at_once(384), depths_at_once(576), depths_at_once(4096)) == (14, 6, 1)
    assert 4 * rows_in_all(4096) * (2 * 4096 + 1) <= 64 << 20
    tasks = _server(start_layer=2).next_tasks()
    assert sum(int(task.settings["max_rows"]) for task in tasks) >= rows_in_all(HIDDEN)


def test_a_wide_model_keeps_one_map_at_a_time_and_fits_it_anew_in_the_next_sweep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chainfed_engine.stand_in.depths_at_once", lambda hidden_size: 1)
    monkeypatch.setattr("chainfed_engine.stand_in._LARGE_BYTES", 1)
    fields: dict[str, Any] = {"start_layer": 3, "window": 1, "rounds": 6, "samples": {"a": 5}}
    server = _server(profile_clients=1, clients_per_round=1, **fields)
    holder = HeldParameters()
    steps: list[str] = []
    while not server.done:
        (task,) = server.next_tasks()
        holder.take(task)
        assert sum(key.startswith("stand_in.") and key.endswith("bias") for key in holder.versions) <= 1
        if task.kind == "profile":
            steps.append(f"fit {task.settings['depth_start']}")
            server.receive([_answer(server, task)])
        else:
            assert task.stage is not None
            steps.append(f"train {task.stage.window.stop}")
            trained = {k: a for k, a in server.parameters().items() if k.startswith(_trained(task))}
            server.receive([Reply("train", "a", task.round_id, 5, trained, {"loss": 1.0}, stage=task.stage)])
        assert len([key for key in server.state()[0] if key.startswith("stand_in.") and key.endswith("bias")]) <= 1
    assert steps == ["fit 4", "train 4", "fit 5", "train 5", "train 6"] * 2


@pytest.mark.parametrize("killed_after", [1, 2, 3, 5])
def test_a_server_restored_between_profiles_asks_for_the_same_depths(
    monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    monkeypatch.setattr("chainfed_engine.stand_in.depths_at_once", lambda hidden_size: 2)
    whole, first, second = (_server(window=1, rounds=8, threshold=0.8) for _ in range(3))
    _advance(whole, 20)
    _advance(first, killed_after)
    arrays, record = first.state()
    second.restore(arrays, json.loads(json.dumps(record)))
    _advance(second, 20)
    assert same_bits(whole.state()[0], second.state()[0]) and whole.done and second.done


def _advance(server: Server, exchanges: int) -> None:
    site = Site(server.client_samples)
    for _ in range(exchanges):
        if server.done:
            return
        replies = []
        for task in server.next_tasks():
            site.held[task.client].update(server.parameters() | server.state()[0])
            replies.append(_answer(server, task) if task.kind == "profile" else site.answer(task))
        server.receive(replies)


def test_a_stage_gets_the_stand_in_of_its_own_depth_once_and_none_at_the_top() -> None:
    server = _server(threshold=0.8, window=2, samples={"a": 5}, clients_per_round=1, rounds=6)
    server.receive(_profile(server))  # the start layer
    server.receive(_profile(server))  # the stand-ins
    depths = []
    while not server.done:
        (task,) = server.next_tasks()
        needed = {key for key in task.versions if key.startswith("stand_in.")}
        sent = {key for key in task.arrays if key.startswith("stand_in.")}
        depths.append(({key.split(".")[1] for key in needed}, bool(sent)))
        trained = {k: a for k, a in server.parameters().items() if k.startswith(_trained(task))}
        server.receive([Reply("train", "a", task.round_id, 5, trained, {"loss": 1.0}, stage=task.stage)])
    assert depths == [({"4"}, True), ({"5"}, True), (set(), False), ({"4"}, False), ({"5"}, False), (set(), False)]


def _trained(task: Task) -> tuple[str, ...]:
    assert task.stage is not None
    return (*(f"adapters.{layer}." for layer in task.stage.window.layers), "classifier.")


def test_the_stand_in_is_the_one_fitted_on_all_clients_together() -> None:
    server = _server(start_layer=2)
    replies = _profile(server)
    server.receive(replies)
    arrays, _ = server.state()
    factors = [{"stand_in.4.factor": reply.arrays["stand_in.4.factor"]} for reply in replies]
    expected = stand_in.solve(stand_in.merge(factors), ridge=server.config.stand_in_ridge)
    for key, array in expected.items():
        np.testing.assert_allclose(arrays[key], array, rtol=1e-3, atol=1e-4)


def test_the_result_does_not_depend_on_who_answers_first() -> None:
    results = []
    for order in itertools.permutations(range(3)):
        server = _server(start_layer=2)
        replies = _profile(server)
        server.receive(replies[index] for index in order)
        results.append(server.state()[0])
    assert all(same_bits(results[0], result) for result in results)


def _spoiled(reply: Reply, what: str) -> Reply:
    arrays = dict(reply.arrays)
    match what:
        case "short scores":
            arrays["cka"] = arrays["cka"][:-1]
        case "NaN scores":
            arrays["cka"] = arrays["cka"] * np.nan
        case "a depth missing":
            del arrays["stand_in.4.factor"]
        case "a wide factor":
            arrays["stand_in.4.factor"] = np.zeros((3, 99), np.float32)
        case "a tall factor":
            arrays["stand_in.4.factor"] = np.zeros((99, 2 * HIDDEN + 1), np.float32)
        case "an empty factor":
            arrays["stand_in.4.factor"] = np.zeros((0, 2 * HIDDEN + 1), np.float32)
        case "a NaN factor":
            arrays["stand_in.4.factor"] = arrays["stand_in.4.factor"] * np.float32(np.nan)
        case "an error":
            return dataclasses.replace(reply, arrays={}, error="no memory")
    return dataclasses.replace(reply, arrays=arrays)


@pytest.mark.parametrize(
    "what",
    [
        "short scores",
        "NaN scores",
        "a depth missing",
        "a wide factor",
        "a tall factor",
        "an empty factor",
        "a NaN factor",
        "an error",
    ],
)
def test_a_bad_profile_is_refused_and_does_no_harm(what: str) -> None:
    start_layer = None if what.endswith("scores") else 2
    server, without = _server(start_layer=start_layer), _server(start_layer=start_layer)
    replies = _profile(server)
    without.next_tasks()
    summary = server.receive([_spoiled(replies[0], what), *replies[1:]])
    assert summary.accepted and set(summary.rejected) == {replies[0].client}
    assert summary.scores == without.receive(replies[1:]).scores
    assert same_bits(server.state()[0], without.state()[0])


def test_a_second_profile_of_the_same_client_is_refused() -> None:
    server, once = _server(start_layer=2), _server(start_layer=2)
    replies = _profile(server)
    once.next_tasks()
    once.receive(replies)
    summary = server.receive([replies[0], replies[0], replies[1], replies[1], replies[2]])
    assert set(summary.rejected) == {replies[0].client, replies[1].client}
    assert same_bits(server.state()[0], once.state()[0])


def test_profiling_is_tried_three_times_with_other_clients_and_then_given_up() -> None:
    server = _server(samples={f"c{index:02d}": 5 for index in range(40)})
    cohorts = []
    for attempt in range(3):
        replies = [_spoiled(reply, "NaN scores") for reply in _profile(server)]
        cohorts.append([reply.client for reply in replies])
        summary = server.receive(replies)
        assert (summary.accepted, summary.index) == (False, attempt)
    assert cohorts[0] != cohorts[1]
    with pytest.raises(NonFiniteLoss, match="profile"):
        server.next_tasks()


def test_training_follows_the_profile() -> None:
    server = _server(stand_in=False, threshold=0.8, rounds=6, window=2)
    site = Site(server.client_samples)
    tasks = server.next_tasks()
    for task in tasks:
        site.held[task.client].update(task.arrays)
    server.receive([_answer(server, task) for task in tasks])
    assert [s.stage.window.start for s in play(server, site=site) if s.stage] == [2, 3, 4, 2, 3, 4]
