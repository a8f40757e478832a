from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from chainfed_engine.config import ChainConfig
from chainfed_engine.server import Server
from chainfed_engine.types import Arrays
from chainfed_engine.update_format import halved
from tests.server.server_parts import Site, changed_keys, initial, make_server, play, shape, stand_in_rows

ALL = {"samples": {"a": 5, "b": 6}, "clients_per_round": 2}


def _num_bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())


def _layers(keys: object) -> set[int]:
    return {int(key.split(".")[1]) for key in keys if key.startswith("adapters.")}  # type: ignore[attr-defined]


def test_a_client_gets_only_what_changed_since_it_was_last_sent_anything() -> None:
    server = make_server(rounds=9, window=2, **ALL)
    site = Site(server.client_samples)
    sent: list[set[int]] = []
    while not server.done:
        tasks = server.next_tasks()
        sent.append(_layers(tasks[0].arrays))
        server.receive([site.answer(task) for task in tasks])
    # First sweep: the window before, which was averaged, and the layer that is new. Then only the window before.
    assert sent[:3] == [{0, 1}, {0, 1, 2}, {1, 2, 3}]
    assert sent[3:6] == [{2, 3}, {0, 1}, {1, 2}]


def test_bytes_are_those_of_the_arrays_carried() -> None:
    server = make_server(**ALL)
    tasks = server.next_tasks()
    replies = [Site(server.client_samples).answer(task) for task in tasks]
    summary = server.receive(replies)
    assert summary.bytes_down == sum(_num_bytes(task.arrays) for task in tasks) > 0
    assert summary.bytes_up == sum(_num_bytes(reply.arrays) for reply in replies) > 0


def test_layers_below_the_start_layer_are_never_sent() -> None:
    server = make_server(start_layer=1, rounds=6, **ALL)
    site = Site(server.client_samples)
    while not server.done:
        tasks = server.next_tasks()
        assert all(0 not in _layers(task.versions) for task in tasks)
        server.receive([site.answer(task) for task in tasks])


def test_later_adapters_are_left_out_where_no_auxiliary_branch_reads_them() -> None:
    for weight, expected in ((0.2, {0, 1, 2, 3}), (0.0, {0, 1})):
        server = make_server(rounds=9, auxiliary_weight=weight, **ALL)
        play(server, rounds=3)
        tasks = server.next_tasks()
        assert tasks[0].stage is not None and tasks[0].stage.window.start == 0
        assert _layers(tasks[0].versions) == expected


def test_adapters_trained_before_the_run_are_sent_wherever_they_are() -> None:
    server = make_server(start_layer=2)
    arrays = {**server.parameters(), "adapters.0.up_bias": np.ones(4, np.float32)}
    warm = Server(server.config, server.shape, arrays, server.client_samples, "classification")
    assert _layers(warm.next_tasks()[0].versions) == {0, 2, 3}


def test_a_refused_round_does_not_hide_the_adapters_its_window_reached() -> None:
    server = make_server(samples={"a": 5}, rounds=6)
    server.next_tasks()
    server.receive([])
    assert _layers(server.next_tasks()[0].versions) == {0, 1, 2}


@pytest.mark.parametrize("trained", ["never", "at-top"])
def test_below_the_top_a_fitted_classifier_travels_inside_the_stand_in_and_is_not_trained(
    trained: Literal["never", "at-top"],
) -> None:
    samples = {"a": 5, "b": 6}
    config = ChainConfig(
        start_layer=0,
        window=2,
        probe_rounds=1,
        rounds=8,
        clients_per_round=2,
        train_classifier=trained,
        update_format="f32",
    )
    server = Server(config, replace(shape(4), architecture="bert"), initial(4), samples, "classification")
    site, seen = Site(samples), []
    while not server.done:
        tasks = server.next_tasks()
        if tasks[0].kind == "profile":
            server.receive([stand_in_rows(task, samples[task.client]) for task in tasks])
            continue
        assert tasks[0].stage is not None
        names = {key.split(".")[-1] for key in tasks[0].versions if not key.startswith("adapters.")}
        seen.append((tasks[0].stage.window.stop, names))
        before = server.parameters()
        assert server.receive([site.answer(task) for task in tasks]).accepted
        moved = any(key.startswith("classifier.") for key in changed_keys(before, server.parameters()))
        fits = bool(tasks[0].settings["closed_form"])
        assert fits or tasks[0].settings["trains_classifier"] == moved
        assert moved == (fits or (trained == "at-top" and tasks[0].stage.window.stop == 4))
    own, merged = {"out_weight", "out_bias"}, {"logit_weight", "logit_bias"}
    assert seen == [(4, own), (2, merged), (3, merged), (4, own), (2, merged), (3, merged), (4, own), (4, own)]


@pytest.mark.parametrize(
    ("architecture", "goes_as"), [("bert", {"logit_weight.int8", "logit_bias.int8"}), ("fake", {"weight", "bias"})]
)
def test_a_stand_in_goes_down_in_eight_bits_where_it_ends_at_the_logits(architecture: str, goes_as: set[str]) -> None:
    """A map to the final hidden state goes as it is."""
    samples = {"a": 5, "b": 6}
    config = ChainConfig(start_layer=0, window=2, probe_rounds=1, rounds=8, clients_per_round=2, update_format="int8")
    server = Server(config, replace(shape(4), architecture=architecture), initial(4), samples, "classification")
    site = Site(samples)
    server.receive([site.answer(task) for task in server.next_tasks()])
    tasks = server.next_tasks()
    assert {task.kind for task in tasks} == {"profile"}
    replies = [stand_in_rows(task, samples[task.client]) for task in tasks]
    server.receive([replace(reply, arrays=halved(reply.arrays)) for reply in replies])
    task = server.next_tasks()[0]
    assert task.stage is not None and task.stage.window.stop == 2
    sent = {key.removeprefix("stand_in.2."): array for key, array in task.arrays.items() if key.startswith("stand_in.")}
    assert {key for key in sent if not key.endswith(".scale")} == goes_as
    assert all(array.dtype == (np.int8 if key.endswith(".int8") else np.float32) for key, array in sent.items())
