"""Hundreds of clients and rounds with a trainer that costs next to nothing: what is left is the federation itself."""

import gc
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

from chainfed_engine.federation import LocalTransport, RunDirectory, fit
from tests.federation.fake_site import FakeTrainer, clients, config, run, server_of


def test_three_hundred_clients_in_one_round(tmp_path: Path) -> None:
    run(tmp_path / "run", config(clients_per_round=300, rounds=3, eval_every=0), count=300)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rounds = [event for event in map(json.loads, lines) if event["event"] == "round"]
    assert all(len(event["clients"]) == 300 for event in rounds)


_EARLY, _LATE = range(116, 121), range(195, 200)  # every client has been asked, and holds something, by then


def test_two_hundred_rounds_over_two_hundred_clients_keep_memory_flat(tmp_path: Path) -> None:
    chain = config(clients_per_round=8, rounds=200, eval_every=50, max_local_steps=1)
    traced: dict[int, int] = {}

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "memory" and event["round"] in (*_EARLY, *_LATE):
            gc.collect()
            traced[event["round"]] = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        run(tmp_path / "run", chain, count=200, on_event=on_event)
    finally:
        tracemalloc.stop()
    # The least of a few rounds: what a thread holds for a moment is not what a run keeps.
    more = min(traced[number] for number in _LATE) - min(traced[number] for number in _EARLY)
    assert more < 256 * 1024, f"{more} bytes more after 80 rounds"
    assert len(list((tmp_path / "run" / "state").glob("state-*"))) == 2


def test_clients_in_one_process_hold_no_more_than_the_current_parameters(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    transport = LocalTransport(clients(60, trainer))
    chain = config(clients_per_round=3, rounds=80, stand_in=False, start_layer=0, eval_every=0)
    server = server_of(chain, transport)
    with RunDirectory(tmp_path / "run") as directory:
        fit(server, transport, None, directory)
    arrays, versions = server._tasks._outgoing.of(*server._model.everything())
    for client in transport._clients.values():
        client.forget_outdated(versions)
        assert all(array is arrays[key] for key, array in client._held._arrays.items())


def test_the_server_costs_microseconds_a_client(tmp_path: Path) -> None:
    transport = LocalTransport(clients(100, FakeTrainer()))
    chain = config(clients_per_round=100, rounds=10, eval_every=0, stand_in=False, start_layer=0)
    events: list[dict[str, Any]] = []
    started = time.perf_counter()
    with RunDirectory(tmp_path / "run") as directory:
        fit(server_of(chain, transport), transport, None, directory, on_event=events.append)
    elapsed = time.perf_counter() - started
    rounds = [event["seconds"] for event in events if event["event"] == "round"]
    # The least of ten rounds: other work on the machine makes it three to five times as long, never shorter.
    server = min(seconds["server"] for seconds in rounds) / 100
    assert server < 2e-3, f"{server * 1e6:.0f} microseconds of server time a client"
    assert elapsed < 60
