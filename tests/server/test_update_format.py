import dataclasses
from typing import Any

import numpy as np
import pytest

from chainfed_engine import classifier_fit
from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import ConfigError
from chainfed_engine.server import Server
from chainfed_engine.server.combine import update_format
from chainfed_engine.server.holdings import Holdings
from chainfed_engine.types import Reply, Task
from chainfed_engine.update_format import encode, halved, unpacked
from tests.server.server_parts import Site, make_server, same_bits

SAMPLES = {f"client-{index}": 20 for index in range(5)}


def _server(**fields: Any) -> Server:
    return make_server(samples=SAMPLES, clients_per_round=5, update_format="int8", **fields)


def _answer(server: Server, site: Site, task: Task) -> Reply:
    reply = site.answer(task)
    arrays = encode(reply.arrays, server.parameters(), seed=int(task.settings["seed"]))
    return dataclasses.replace(reply, arrays=arrays)


def test_eight_bit_updates_are_averaged_as_what_they_stand_for_and_count_their_own_bytes() -> None:
    server, site = _server(), Site(SAMPLES)
    tasks = server.next_tasks()
    assert {task.settings["update_format"] for task in tasks} == {"int8"}
    replies = [_answer(server, site, task) for task in tasks]
    exact = [site.answer(task) for task in tasks]
    summary = server.receive([*reversed(replies), replies[0]])  # any order, one of them twice
    assert len(summary.clients) == 5 and not summary.rejected
    sent = [sum(array.nbytes for array in reply.arrays.values()) for reply in replies]
    assert summary.bytes_up == sum(sent) + sent[0]
    for key, array in exact[0].arrays.items():
        expected = np.mean([reply.arrays[key] for reply in exact], axis=0)
        np.testing.assert_allclose(server.parameters()[key], expected, atol=0.05)
        assert array.dtype == server.parameters()[key].dtype


def test_a_liar_in_eight_bits_is_refused_like_one_in_thirty_two() -> None:
    server, without, site = _server(), _server(), Site(SAMPLES)
    replies = [_answer(server, site, task) for task in server.next_tasks()]
    without.next_tasks()
    loud = {key: array * 1000 if key.endswith(".scale") else array for key, array in replies[1].arrays.items()}
    f32 = site.answer(server.next_tasks()[2]).arrays
    huge = {
        key: np.full_like(array, 3e38) if key.endswith(".scale") else np.full_like(array, 127)
        for key, array in replies[3].arrays.items()
    }
    spoilt = {1: loud, 2: f32, 3: huge}
    given = [dataclasses.replace(reply, arrays=spoilt.get(n, reply.arrays)) for n, reply in enumerate(replies)]
    summary = server.receive(given)
    assert {name: reason.split(":")[0] for name, reason in summary.rejected.items()} == {
        "client-1": "norm",
        "client-2": "update_format",
        "client-3": "not finite",
    }
    without.receive([replies[0], replies[4]])
    assert summary.clients == ("client-0", "client-4")
    assert same_bits(server.parameters(), without.parameters())


def test_what_goes_down_is_packed_once_and_the_server_keeps_its_own_exact() -> None:
    server, site = _server(rounds=2), Site(SAMPLES)
    server.receive([_answer(server, site, task) for task in server.next_tasks()])
    exact = server.parameters()
    tasks = server.next_tasks()
    codes = [key for key in tasks[0].arrays if key.endswith(".int8")]
    assert codes and all(tasks[0].arrays[key] is task.arrays[key] for task in tasks for key in codes)
    for key, array in unpacked(tasks[0].arrays).items():
        if key.startswith("adapters."):
            np.testing.assert_allclose(array, exact[key], atol=float(np.abs(exact[key]).max()) / 250)
            assert (array != exact[key]).any() or not exact[key].any()
    evaluated = server.evaluation_task("judge").arrays
    assert all(evaluated[key].tobytes() == exact[key].tobytes() for key in exact)


def test_statistics_travel_in_sixteen_bits_and_fit_what_they_fit_in_thirty_two() -> None:
    generator = np.random.default_rng(0)
    x, labels = generator.normal(size=(200, 24)).astype(np.float32), generator.integers(0, 4, 200)
    x[:, 0] += labels
    exact = classifier_fit.statistics(x, labels, 4)
    sent = halved(exact)
    (key,) = exact
    assert sent[key].dtype == np.float16 and sent[key].nbytes * 2 == exact[key].nbytes
    pair = [classifier_fit.solve(arrays[key], 4)["classifier.out_weight"] for arrays in (exact, sent)]
    np.testing.assert_allclose(*pair, atol=2e-3 * float(np.abs(pair[0]).max()))


def test_a_number_that_sixteen_bits_cannot_hold_leaves_its_array_as_it_is() -> None:
    statistics = {"large": np.full((2, 3), 1e5, np.float32), "cka": np.ones(2), "small": np.ones(2, np.float32)}
    sent = halved(statistics)
    assert {key: array.dtype.str for key, array in sent.items()} == {"large": "<f4", "cka": "<f8", "small": "<f2"}


def test_closed_form_rounds_ask_for_halves_and_count_them_like_the_rows_they_stand_for() -> None:
    counted = []
    for travels in ("f32", "int8"):
        server = make_server(probe_rounds=1, refit_rounds=0, rounds=3, update_format=travels)
        tasks = server.next_tasks()
        assert {task.settings["update_format"] for task in tasks} == {travels}
        site = Site(server.client_samples)
        replies = [site.answer(task) for task in tasks]
        if travels == "int8":
            replies = [dataclasses.replace(reply, arrays=halved(reply.arrays)) for reply in replies]
        summary = server.receive([*replies, replies[0]])  # one of them twice
        assert len(summary.clients) == len(tasks) and not summary.rejected
        counted.append((server.parameters(), summary.bytes_up))
    (exact, f32_bytes), (near, half_bytes) = counted
    assert half_bytes * 2 == f32_bytes
    assert not same_bits(exact, near)
    for key in ("classifier.out_weight", "classifier.out_bias"):
        np.testing.assert_allclose(near[key], exact[key], atol=5e-3 * float(np.abs(exact[key]).max()))


def test_halves_are_refused_where_nobody_asked_for_them() -> None:
    server = make_server(probe_rounds=1, refit_rounds=0, rounds=3)
    site = Site(server.client_samples)
    replies = [site.answer(task) for task in server.next_tasks()]
    halves = [dataclasses.replace(reply, arrays=halved(reply.arrays)) for reply in replies]
    summary = server.receive([halves[0], *replies[1:]])
    assert list(summary.rejected) == [replies[0].client] and "float16" in summary.rejected[replies[0].client]


def test_the_classifier_goes_down_in_eight_bits_too_and_not_with_a_profile() -> None:
    server = make_server(
        num_layers=6, start_layer=None, stand_in=True, probe_rounds=1, refit_rounds=0, update_format="int8"
    )
    profile = server.next_tasks()[0]
    assert profile.kind == "profile" and not any(key.startswith("classifier.") for key in profile.versions)
    probing = make_server(probe_rounds=1, refit_rounds=0, rounds=3, update_format="int8").next_tasks()[0]
    sent = {key for key in probing.arrays if key.startswith("classifier.")}
    assert sent == {f"classifier.{name}{end}" for name in ("out_weight", "out_bias") for end in (".int8", ".scale")}


def test_a_version_that_comes_again_is_sent_again() -> None:
    """Eight bits take few values: an adapter may come to have the codes of two rounds ago, which nobody kept."""
    holdings = Holdings()
    holdings.confirm("a", {"k": "1", "other": "x"})
    holdings.forget_outdated({"k": "2"})
    assert holdings.lacking("a", {"k": "1", "other": "x"}) == ["k"]


def test_by_default_parameters_travel_in_eight_bits_where_the_rules_allow_it() -> None:
    formats = {
        method: update_format(ChainConfig(method=method)) for method in ("chain", "full-adapters", "lora", "fedra")
    }
    assert set(formats.values()) == {"int8"}
    assert {update_format(ChainConfig(method=method)) for method in ("fwdllm", "fedkseed", "flora")} == {"f32"}
    assert update_format(ChainConfig(late_replies="discount")) == "f32"
    assert update_format(ChainConfig(late_replies="discount", update_format="int8")) == "int8"  # refused by the server


@pytest.mark.parametrize("method", ["fwdllm", "fedkseed", "flora"])
def test_methods_that_do_not_send_parameters_refuse_the_format(method: str) -> None:
    from tests.server.test_methods import make_server as method_server

    with pytest.raises(ConfigError, match="update_format"):
        method_server(method=method, update_format="int8")
