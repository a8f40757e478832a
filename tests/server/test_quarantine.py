import dataclasses
import json

import numpy as np
import pytest

from chainfed_engine.server import Server
from chainfed_engine.server.quarantine import Size, refuse_norms, typical_size, update_norm
from chainfed_engine.types import Reply
from tests.server.server_parts import Site, make_server, same_bits

SAMPLES = {f"client-{index}": 20 for index in range(7)}


def _replies(server: Server, *, scale: dict[int, float] | None = None, site: Site | None = None) -> list[Reply]:
    site = site or Site(server.client_samples)
    replies = []
    for index, task in enumerate(server.next_tasks()):
        before = {**server.parameters()}
        reply = site.answer(task)
        factor = np.float32((scale or {}).get(index, 1.0))
        arrays = {key: before[key] + factor * (array - before[key]) for key, array in reply.arrays.items()}
        replies.append(dataclasses.replace(reply, arrays=arrays))
    return replies


@pytest.mark.parametrize("factor", [1000.0, -30.0, 6.0])
def test_an_update_far_larger_than_the_cohorts_is_refused_with_its_norm(factor: float) -> None:
    server, without = (
        make_server(samples=SAMPLES, clients_per_round=7),
        make_server(samples=SAMPLES, clients_per_round=7),
    )
    replies = _replies(server, scale={2: factor})
    without.next_tasks()
    summary = server.receive(replies)
    assert list(summary.rejected) == ["client-2"] and summary.rejected["client-2"].startswith("norm: ")
    assert summary.typical_norm == pytest.approx(1.0, rel=0.2)
    without.receive([reply for index, reply in enumerate(replies) if index != 2])
    assert same_bits(server.parameters(), without.parameters())


def test_updates_within_the_limit_all_count_and_zero_means_no_limit() -> None:
    server = make_server(samples=SAMPLES, clients_per_round=7)
    assert len(server.receive(_replies(server, scale={2: 3.0, 3: 0.0})).clients) == 7
    server = make_server(samples=SAMPLES, clients_per_round=7, norm_limit=0.0)
    assert len(server.receive(_replies(server, scale={2: 1e4})).clients) == 7


def test_a_client_with_more_steps_may_move_further() -> None:
    samples = {**SAMPLES, "client-0": 200}  # 13 steps where the others have 2
    server = make_server(samples=samples, clients_per_round=7)
    assert len(server.receive(_replies(server, scale={0: 30.0})).clients) == 7
    server = make_server(samples=samples, clients_per_round=7)
    assert list(server.receive(_replies(server, scale={0: 1000.0})).rejected) == ["client-0"]


def test_a_cohort_too_small_to_tell_is_held_against_the_last_that_could_even_after_a_restart() -> None:
    server = make_server(samples=SAMPLES, clients_per_round=7)
    site = Site(server.client_samples)
    server.receive(_replies(server, site=site))
    arrays, record = server.state()
    restored = make_server(samples=SAMPLES, clients_per_round=7)
    restored.restore(arrays, json.loads(json.dumps(record)))
    for each, its_site in ((server, site), (restored, Site(SAMPLES))):
        summary = each.receive(_replies(each, scale={1: 1000.0}, site=its_site)[:2])
        assert summary.clients == ("client-0",) and list(summary.rejected) == ["client-1"]


def test_norms_are_root_mean_squares_and_survive_values_that_overflow() -> None:
    before = {"a": np.zeros(3, np.float32), "b": np.zeros(1, np.float32)}
    assert update_norm({"a": np.full(3, 2, np.float32), "b": np.full(1, 2, np.float32)}, before) == 2.0
    huge = update_norm({"a": np.full(3, 3e38, np.float32)}, {"a": np.full(3, -3e38, np.float32)})
    assert huge > 1e38
    sizes = {"x": Size(1.0, 1), "y": Size(1.1, 1), "z": Size(float("inf"), 1)}
    assert list(refuse_norms(sizes, typical_size(sizes, None), limit=5)) == ["z"]
    assert refuse_norms(sizes, None, limit=5) == {} and typical_size({"x": Size(1, 1)}, None) is None


def test_an_idle_cohort_refuses_no_other_idle_client() -> None:
    sizes = {name: Size(0.0, 1) for name in "abc"}
    assert refuse_norms(sizes, typical_size(sizes, None), limit=5) == {}
