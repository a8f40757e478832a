"""What a late reply may still do: nothing by default; with `late_replies = "discount"` count once, for less."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from chainfed_engine.errors import ConfigError
from chainfed_engine.server import Server, Summary
from chainfed_engine.types import Reply
from tests.server.server_parts import Site, make_server, same_bits

SAMPLES = {f"client-{index}": 20 for index in range(4)}


def _server(**fields: Any) -> Server:
    """Every round asks everybody and trains the same window."""
    given = {"method": "top-window", "clients_per_round": 4, "late_replies": "discount", "rounds": 8, **fields}
    return make_server(samples=SAMPLES, **given)


def _round(server: Server, site: Site, *, silent: tuple[str, ...] = (), late: tuple[Reply, ...] = ()) -> Any:
    replies = [site.answer(task) for task in server.next_tasks()]
    given = [*late, *(reply for reply in replies if reply.client not in silent)]
    return server.receive(given), replies


def test_a_late_reply_counts_once_at_half_its_weight_where_its_client_says_nothing_newer() -> None:
    server, site = _server(), Site(SAMPLES)
    _, first = _round(server, site, silent=("client-1",))
    late = first[1]
    summary, second = _round(server, site, silent=("client-1",), late=(late, late))
    assert isinstance(summary, Summary)
    assert summary.stale == {"client-1": 1} and summary.num_late == 2 and "client-1" in summary.clients
    counted = [second[0], late, second[2], second[3]]
    for key in late.arrays:
        expected = np.average([reply.arrays[key] for reply in counted], axis=0, weights=[20, 10, 20, 20])
        np.testing.assert_allclose(server.parameters()[key], expected, rtol=1e-5, atol=1e-6)
    summary, _ = _round(server, site, late=(late,))
    assert not summary.stale  # it counted already


def test_a_newer_reply_of_the_client_replaces_the_late_one_in_whatever_order_they_come() -> None:
    for reverse in (False, True):
        server, without, site = _server(), _server(), Site(SAMPLES)
        _, first = _round(server, site, silent=("client-1",))
        _round(without, Site(SAMPLES), silent=("client-1",))
        replies = [site.answer(task) for task in server.next_tasks()]
        without.next_tasks()
        given = [first[1], *replies]
        summary = server.receive(reversed(given) if reverse else given)
        without.receive(replies)
        assert summary.stale == {} and same_bits(server.parameters(), without.parameters())


@pytest.mark.parametrize("case", ["dropped by default", "answered in time", "too late", "another window", "a liar"])
def test_a_late_reply_that_must_not_count_changes_nothing(case: str) -> None:
    fields: dict[str, Any] = {"late_replies": "drop"} if case == "dropped by default" else {}
    if case == "another window":
        fields["method"] = "chain"
    server, without = _server(**fields), _server(**fields)
    site, other = Site(SAMPLES), Site(SAMPLES)
    silent = () if case == "answered in time" else ("client-1",)
    _, first = _round(server, site, silent=silent)
    _round(without, other, silent=silent)
    for _ in range(4 if case == "too late" else 0):
        _round(server, site, silent=("client-1",))
        _round(without, other, silent=("client-1",))
    late = first[1]
    if case == "answered in time":  # delayed by the network and changed on its way
        late = dataclasses.replace(late, arrays={key: -array for key, array in late.arrays.items()})
    if case == "a liar":
        late = dataclasses.replace(late, arrays={key: 1000 * array for key, array in late.arrays.items()})
    summary, _ = _round(server, site, silent=("client-1",), late=(late,))
    _round(without, other, silent=("client-1",))
    assert summary.stale == {} and summary.num_late == 1
    assert ("norm" in str(summary.rejected)) == (case == "a liar")
    assert same_bits(server.parameters(), without.parameters())


def test_late_rows_of_the_closed_form_are_dropped() -> None:
    server = _server(method="chain", probe_rounds=2, stand_in=True)
    site = Site(SAMPLES)
    _, first = _round(server, site, silent=("client-1",))
    summary, _ = _round(server, site, silent=("client-1",), late=(first[1],))
    assert summary.stale == {} and summary.num_late == 1 and summary.accepted


def test_a_server_that_was_restored_still_knows_who_owes_what() -> None:
    server, site = _server(), Site(SAMPLES)
    _, first = _round(server, site, silent=("client-1",))
    arrays, record = server.state()
    restored = _server()
    restored.restore(arrays, json.loads(json.dumps(record)))
    summary, _ = _round(restored, Site(SAMPLES), silent=("client-1",), late=(first[1],))
    expected, _ = _round(server, site, silent=("client-1",), late=(first[1],))
    assert summary.stale == expected.stale == {"client-1": 1}
    assert same_bits(server.parameters(), restored.parameters())


@pytest.mark.parametrize("fields", [{"update_format": "int8"}, {"method": "fedkseed"}, {"dp_noise": 1.0}])
def test_it_is_refused_where_it_would_mean_something_else(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="late_replies"):
        _server(**fields)
