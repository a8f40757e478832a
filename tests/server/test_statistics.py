"""What a hostile client can do with statistics: they are sums, so one client's could outweigh everybody's."""

import dataclasses
import tracemalloc
from typing import Any

import numpy as np
import pytest

from chainfed_engine import classifier_fit, stand_in
from chainfed_engine.server import Server
from chainfed_engine.server.quarantine import weight_cap
from chainfed_engine.server.statistics import refuse_one_hot
from chainfed_engine.types import Arrays, Reply, Task
from tests.server.server_parts import HIDDEN, Site, make_server, same_bits

SAMPLES = {f"client-{index}": 20 for index in range(6)}


def _probing(**fields: Any) -> Server:
    return make_server(**{"samples": SAMPLES, "clients_per_round": 6, "probe_rounds": 2, "stand_in": True, **fields})


def _profiling(**fields: Any) -> Server:
    return make_server(
        **{"samples": SAMPLES, "num_layers": 6, "start_layer": None, "stand_in": True, "profile_clients": 6, **fields}
    )


def _statistics(task: Task) -> Reply:
    generator = np.random.default_rng(int(task.settings["seed"]))
    arrays: Arrays = {"cka": np.linspace(0.9, 0.1, 6)} if task.settings["with_scores"] else {}
    for depth in range(int(task.settings["depth_start"]), int(task.settings["depth_stop"])):
        x = generator.normal(size=(6, HIDDEN)).astype(np.float32)
        arrays.update(stand_in.statistics(depth, x, 2 * x + 1))
    return Reply("profile", task.client, task.round_id, 20, arrays)


def _changed(reply: Reply, change: Any) -> Reply:
    return dataclasses.replace(reply, arrays={key: change(array) for key, array in reply.arrays.items()})


def _as_sent(reply: Reply, travels: str) -> Reply:
    """In sixteen bits where these travel, whether or not an honest client would have left them in more."""
    return _changed(reply, lambda a: a.astype(np.float16) if travels == "int8" and a.dtype == np.float32 else a)


def _more_labels(factor: np.ndarray) -> np.ndarray:
    return np.concatenate([factor[:, : HIDDEN + 1], 3 * factor[:, HIDDEN + 1 :]], axis=1)


def _louder(factor: np.ndarray) -> np.ndarray:
    return np.concatenate([1000 * factor[:, :HIDDEN], factor[:, HIDDEN:]], axis=1)


@pytest.mark.parametrize("travels", ["f32", "int8"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda factor: factor * np.float32(1000), "rows, got those of"),
        (lambda factor: factor * np.float32(0), "rows, got those of"),
        (_more_labels, "one label a row"),
        (_louder, "the cohort's median is"),
        (lambda factor: np.where(factor == factor[0, 0], np.float32(np.nan), factor), "not finite"),
        (lambda factor: factor.astype(np.float64), "expected float"),
        (lambda factor: factor[:, :-1], "expected float"),
        (lambda factor: np.repeat(factor, 1000, axis=0), "expected float"),
    ],
)
def test_statistics_of_a_liar_do_not_count_and_its_round_goes_on(change: Any, reason: str, travels: str) -> None:
    server, without = _probing(update_format=travels), _probing(update_format=travels)
    site = Site(SAMPLES)
    replies = [_as_sent(site.answer(task), travels) for task in server.next_tasks()]
    without.next_tasks()
    lie = _as_sent(_changed(replies[0], change), travels)
    summary = server.receive([lie, *replies[1:]])
    assert list(summary.rejected) == [replies[0].client] and reason in summary.rejected[replies[0].client]
    without.receive(replies[1:])
    assert same_bits(server.parameters(), without.parameters())


def test_a_small_cohort_is_held_against_the_statistics_that_count_already() -> None:
    server, site = _probing(), Site(SAMPLES)
    server.receive([site.answer(task) for task in server.next_tasks()])
    replies = [site.answer(task) for task in server.next_tasks()][:2]
    summary = server.receive([_changed(replies[0], _louder), replies[1]])
    assert summary.clients == (replies[1].client,) and list(summary.rejected) == [replies[0].client]


@pytest.mark.parametrize("liar", range(6))
def test_a_liars_stand_in_statistics_do_not_count_wherever_it_stands_in_the_alphabet(liar: int) -> None:
    server, without = _profiling(start_layer=1), _profiling(start_layer=1)
    replies = [_statistics(task) for task in server.next_tasks()]
    without.next_tasks()
    wide = 2 * HIDDEN + 1

    def loud(array: np.ndarray) -> np.ndarray:
        if array.shape[-1] != wide:
            return array
        return np.where(np.arange(wide) == HIDDEN, array, 1000 * array).astype(np.float32)

    name = replies[liar].client
    summary = server.receive([_changed(reply, loud) if reply.client == name else reply for reply in reversed(replies)])
    assert list(summary.rejected) == [name] and "the cohort's median is" in summary.rejected[name]
    without.receive([reply for reply in replies if reply.client != name])
    assert server.start_layer == without.start_layer
    assert same_bits(server.state()[0], without.state()[0])


@pytest.mark.parametrize("scores", [np.full(6, 1e6), np.full(6, -1e6)])
def test_scores_that_are_no_similarities_are_refused(scores: np.ndarray) -> None:
    server = _profiling()
    replies = [_statistics(task) for task in server.next_tasks()]
    bad = dataclasses.replace(replies[2], arrays={**replies[2].arrays, "cka": scores})
    summary = server.receive([*replies[:2], bad, *replies[3:]])
    assert "from 0 to 1" in summary.rejected[bad.client] and len(summary.clients) == 5


def test_rows_beyond_those_that_were_asked_for_are_refused() -> None:
    server = _profiling(start_layer=1)
    replies = [_statistics(task) for task in server.next_tasks()]
    key = next(iter(replies[0].arrays))
    many = dataclasses.replace(replies[0], arrays={**replies[0].arrays, key: replies[0].arrays[key] * np.float32(1e5)})
    assert "rows, got those of" in server.receive([many, *replies[1:]]).rejected[many.client]


def test_a_client_that_announces_a_billion_samples_weighs_ten_medians() -> None:
    samples = {**SAMPLES, "client-0": 10**9}
    assert weight_cap(samples, 10.0) == 200
    assert weight_cap({"a": 1, "b": 10**9}, 10.0) is None and weight_cap(samples, 0.0) is None
    server = make_server(samples=samples, clients_per_round=6)
    site, before = Site(samples), server.parameters()
    replies = [site.answer(task) for task in server.next_tasks()]
    server.receive([replies[0], *replies])  # a repeated reply is still a repeated one
    weights = [min(samples[reply.client], 200) for reply in replies]
    for key in replies[0].arrays:
        expected = np.average([reply.arrays[key] for reply in replies], axis=0, weights=weights)
        np.testing.assert_allclose(server.parameters()[key], expected, rtol=1e-5, atol=1e-6)
    assert before.keys() == server.parameters().keys()


def test_a_lie_about_samples_buys_no_larger_norm() -> None:
    samples = {**SAMPLES, "client-0": 10**9}
    server = make_server(samples=samples, clients_per_round=6)
    site = Site(samples)
    replies = [site.answer(task) for task in server.next_tasks()]
    before = server.parameters()
    arrays = {key: before[key] + np.float32(100) * (array - before[key]) for key, array in replies[0].arrays.items()}
    summary = server.receive([dataclasses.replace(replies[0], arrays=arrays), *replies[1:]])
    assert list(summary.rejected) == ["client-0"]


def test_labels_of_many_classes_are_checked_without_a_matrix_of_all_of_them() -> None:
    """C x C in float64 would be 72 MB here, for a reply of 0.25 MB."""
    generator = np.random.default_rng(0)
    x, labels = generator.normal(size=(20, 8)).astype(np.float32), generator.integers(3000, size=20)
    honest = classifier_fit.statistics(x, labels, 3000)[classifier_fit.FACTOR_KEY]
    twice = honest.copy()
    twice[3, 9 + (labels[3] + 1500) % 3000] = 1.0
    tracemalloc.start()
    reasons = [refuse_one_hot("factor", factor, 8) for factor in (honest, twice)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reasons[0] is None and reasons[1] is not None and "one label a row" in reasons[1]
    assert peak < 4 << 20
