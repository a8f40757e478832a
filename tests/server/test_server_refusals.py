import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import InconsistentUpdates, NonFiniteLoss
from chainfed_engine.server import MAX_REJECTED_IN_A_ROW, Server
from chainfed_engine.types import Reply, Stage, Window
from tests.server.server_parts import Site, initial, make_server, play, same_bits, shape, stand_in_rows

KEY = "adapters.1.up_weight"


def _with_array(reply: Reply, value: Any) -> Reply:
    return dataclasses.replace(reply, arrays={**reply.arrays, KEY: value})


def _nan(reply: Reply) -> Reply:
    array = reply.arrays[KEY].copy()
    array.flat[-1] = np.nan
    return _with_array(reply, array)


def _without_key(reply: Reply) -> Reply:
    return dataclasses.replace(reply, arrays={key: a for key, a in reply.arrays.items() if key != KEY})


BAD: dict[str, tuple[Callable[[Reply], Reply], str]] = {
    "an error": (lambda r: dataclasses.replace(r, error="out\nof memory", arrays={}), "client error: out of memory"),
    "NaN": (_nan, "not finite"),
    "infinity": (lambda r: _with_array(r, np.full_like(r.arrays[KEY], np.inf)), "not finite"),
    "another shape": (lambda r: _with_array(r, r.arrays[KEY].T.copy()), "expected float32"),
    "another dtype": (lambda r: _with_array(r, r.arrays[KEY].astype(np.float64)), "float64"),
    "no array": (lambda r: _with_array(r, [[0.0]]), "got list"),
    "a key missing": (_without_key, "missing"),
    "a key too many": (
        lambda r: dataclasses.replace(r, arrays={**r.arrays, "adapters.3.up_bias": np.zeros(4, np.float32)}),
        "not asked for",
    ),
    "another round": (lambda r: dataclasses.replace(r, round_id=7), "expected round 0"),
    "another window": (
        lambda r: dataclasses.replace(r, stage=Stage("window", Window(1, 3), 0)),
        "expected the window 0 to 2, got 1 to 3",
    ),
    "no window": (lambda r: dataclasses.replace(r, stage=None), "got none"),
    "another model": (lambda r: dataclasses.replace(r, base="other"), "frozen model"),
    "another kind": (lambda r: dataclasses.replace(r, kind="evaluate"), "expected a reply to train"),
    "a number that no float holds": (
        lambda r: dataclasses.replace(r, metrics={"loss": 10**400}),
        "beyond float64",
    ),
    "no samples": (lambda r: dataclasses.replace(r, num_samples=0), "num_samples"),
    "more samples than announced": (lambda r: dataclasses.replace(r, num_samples=10**9), "num_samples"),
    "samples that are no number": (lambda r: dataclasses.replace(r, num_samples="9"), "num_samples"),  # type: ignore[arg-type]
    "a NaN loss": (lambda r: dataclasses.replace(r, metrics={"loss": float("nan")}), "not finite"),
    "a loss that overflows every sum": (lambda r: dataclasses.replace(r, metrics={"loss": 1e308}), "expected at most"),
    "a metric with a name of markup": (
        lambda r: dataclasses.replace(r, metrics={"loss": 1.0, "<b>": 1.0}),
        "expected names",
    ),
    "no loss": (lambda r: dataclasses.replace(r, metrics={}), "expected loss"),
    "a metric that is text": (lambda r: dataclasses.replace(r, metrics={"loss": "1"}), "expected a number"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_bad_reply_is_refused_with_a_reason_and_does_no_harm(what: str, position: int) -> None:
    spoil, reason = BAD[what]
    server, without = make_server(), make_server()
    replies = [Site(server.client_samples).answer(task) for task in server.next_tasks()]
    without.next_tasks()
    others = [reply for index, reply in enumerate(replies) if index != position]
    bad = replies[position].client
    replies[position] = spoil(replies[position])
    summary = server.receive(replies)
    assert summary.accepted
    assert set(summary.rejected) == {bad}
    assert reason in summary.rejected[bad]
    assert "\n" not in summary.rejected[bad]
    without.receive(others)
    assert same_bits(server.parameters(), without.parameters())


def test_a_client_that_answers_twice_and_differently_counts_not_at_all_in_any_order() -> None:
    results = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        server = make_server()
        replies = [Site(server.client_samples).answer(task) for task in server.next_tasks()]
        replies.append(_nan(replies[0]))
        summary = server.receive([replies[index] for index in order])
        assert summary.clients == (replies[1].client, replies[2].client)
        assert summary.rejected == {replies[0].client: "more than one reply to one task, and not the same"}
        results.append(server.parameters())
    assert all(same_bits(results[0], result) for result in results)


def test_a_client_that_was_not_asked_is_refused() -> None:
    server = make_server()
    replies = [Site(server.client_samples).answer(task) for task in server.next_tasks()]
    stranger = dataclasses.replace(replies[0], client="stranger\nwith a long name" * 100)
    summary = server.receive([*replies, stranger])
    assert len(summary.clients) == 3
    assert list(summary.rejected.values()) == ["not asked in this round"]
    assert all(len(name) <= 300 and "\n" not in name for name in summary.rejected)


def _all_bad(server: Server, spoil: Callable[[Reply], Reply]) -> None:
    site = Site(server.client_samples)
    summary = server.receive([spoil(site.answer(task)) for task in server.next_tasks()])
    assert not summary.accepted
    assert summary.loss is None


def test_a_round_without_a_usable_reply_is_rejected_and_keeps_the_state() -> None:
    server = make_server()
    play(server, rounds=1)
    before = server.parameters()
    _all_bad(server, lambda reply: dataclasses.replace(reply, error="battery low"))
    assert same_bits(before, server.parameters())
    assert server.round_id == 2


@pytest.mark.parametrize(("reason", "kind"), [("NaN", NonFiniteLoss), ("an error", InconsistentUpdates)])
def test_three_rejected_rounds_in_a_row_stop_the_run_with_the_reasons(reason: str, kind: type[Exception]) -> None:
    server = make_server(window=2, start_layer=0, method="full-adapters", rounds=20)
    spoil, text = BAD[reason]
    for _ in range(MAX_REJECTED_IN_A_ROW - 1):
        _all_bad(server, spoil)
    play(server, rounds=1)
    for _ in range(MAX_REJECTED_IN_A_ROW):
        _all_bad(server, spoil)
    with pytest.raises(kind, match=text.split(":")[0]):
        server.next_tasks()


def test_a_silent_cohort_is_a_rejected_round() -> None:
    server = make_server()
    server.next_tasks()
    summary = server.receive([])
    assert not summary.accepted
    assert summary.rejected == {}


def test_after_an_error_the_client_gets_everything_anew() -> None:
    server = make_server(method="full-adapters", samples={"a": 5}, rounds=9)
    site = Site(server.client_samples)
    (task,) = server.next_tasks()
    everything = set(task.arrays)
    server.receive([dataclasses.replace(site.answer(task), error="disk full", arrays={})])
    assert set(server.next_tasks()[0].arrays) == everything


def test_the_same_answer_twice_counts_once() -> None:
    server, once = make_server(), make_server()
    replies = [Site(server.client_samples).answer(task) for task in server.next_tasks()]
    again = dataclasses.replace(replies[1], arrays={key: array.copy() for key, array in replies[1].arrays.items()})
    summary = server.receive([replies[0], again, replies[1], replies[2], again])
    assert summary.rejected == {} and len(summary.clients) == 3
    once.next_tasks()
    once.receive(replies)
    assert same_bits(server.parameters(), once.parameters())


def test_an_answer_to_an_earlier_round_is_dropped_and_its_client_may_still_answer_this_one() -> None:
    server = make_server(samples={"a": 5, "b": 6}, clients_per_round=2)
    site = Site(server.client_samples)
    first = [site.answer(task) for task in server.next_tasks()]
    summary = server.receive(first[:1])
    assert summary.silent == ("b",) and summary.num_late == 0
    second = [site.answer(task) for task in server.next_tasks()]
    summary = server.receive([first[1], *second])
    assert summary.clients == ("a", "b") and summary.num_late == 1 and summary.rejected == {}
    server.next_tasks()
    summary = server.receive([first[1]])
    assert summary.silent == ("a", "b") and summary.num_late == 1 and summary.rejected == {}


def test_a_classifier_that_nobody_fitted_is_trained_by_the_windows() -> None:
    """The first round fits it in closed form; where that round brought nothing, steps must."""
    samples = {"a": 5, "b": 6}
    config = ChainConfig(
        start_layer=0, window=4, probe_rounds=1, refit_rounds=0, rounds=5, clients_per_round=2, update_format="f32"
    )
    told = []
    for answered in (True, False):
        server = Server(
            config, dataclasses.replace(shape(4), architecture="bert"), initial(4), samples, "classification"
        )
        site = Site(samples)
        replies = [site.answer(task) for task in server.next_tasks()]
        assert server.receive(replies if answered else []).accepted == answered
        for _ in range(3):  # rounds that train it do not make it fitted, nor does a restart
            tasks = server.next_tasks()
            told.append({bool(task.settings["trains_classifier"]) for task in tasks})
            server.receive([site.answer(task) for task in tasks])
            server.restore(*server.state())
            site = Site(samples)
    assert told == [{False}] * 3 + [{True}] * 3


@pytest.mark.parametrize("with_stand_in", [True, False])
def test_a_classifier_that_is_trained_at_the_top_is_trained_nowhere_else(with_stand_in: bool) -> None:
    samples = {"a": 5, "b": 6}
    config = ChainConfig(
        start_layer=0, window=2, probe_rounds=1, rounds=8, clients_per_round=2, train_classifier="at-top",
        stand_in=with_stand_in, update_format="f32",
    )  # fmt: skip
    server = Server(config, dataclasses.replace(shape(4), architecture="bert"), initial(4), samples, "classification")
    site, seen = Site(samples), set()
    while not server.done:
        tasks = server.next_tasks()
        if tasks[0].kind == "profile":
            server.receive([stand_in_rows(task, samples[task.client]) for task in tasks])
            continue
        stage = tasks[0].stage
        assert stage is not None
        if stage.kind == "window":
            seen.add((stage.window.stop, bool(tasks[0].settings["trains_classifier"])))
        server.receive([site.answer(task) for task in tasks])
    assert seen == {(2, False), (3, False), (4, True)}


def test_profiles_do_not_hide_that_no_round_counts() -> None:
    """One depth an exchange: a profile before every new window, and every round refused."""
    samples = {"a": 5, "b": 6}
    server = make_server(
        num_layers=6, window=2, start_layer=0, stand_in=True, schedule="train-and-freeze", samples=samples, rounds=6,
        clients_per_round=2, profile_clients=2,
    )  # fmt: skip
    with (
        mock.patch("chainfed_engine.stand_in.depths_at_once", lambda hidden_size: 1),
        pytest.raises(InconsistentUpdates, match="in a row"),
    ):
        while not server.done:
            tasks = server.next_tasks()
            if tasks[0].kind == "profile":
                server.receive([stand_in_rows(task, samples[task.client]) for task in tasks])
            else:
                server.receive([BAD["an error"][0](Site(samples).answer(task)) for task in tasks])


def test_a_rejected_profile_is_no_rejected_round() -> None:
    samples = {"a": 5, "b": 6}
    server = make_server(
        num_layers=6, window=5, start_layer=0, stand_in=True, schedule="train-and-freeze", samples=samples, rounds=2,
        clients_per_round=2, profile_clients=2,
    )  # fmt: skip
    server.receive([BAD["an error"][0](stand_in_rows(task, samples[task.client])) for task in server.next_tasks()])
    server.restore(*server.state())
    server.receive([stand_in_rows(task, samples[task.client]) for task in server.next_tasks()])
    site = Site(samples)
    server.receive([site.answer(task) for task in server.next_tasks()])
    server.receive([BAD["an error"][0](site.answer(task)) for task in server.next_tasks()])
    told = server.setbacks_at_end()
    assert told is not None and "in the last 1 of 2 rounds" in told
