"""Flower for real: SuperLink, SuperExec and three SuperNodes on 127.0.0.1, TLS, registered keys, a database.

Two minutes of two cores, so only where CHAINFED_FLOWER is set: `make flower`. The same code without a network runs in
test_deployment.py.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.federation.deployed import SITES, make_files
from tests.federation.flower_processes import (
    children,
    end,
    free_ports,
    join,
    joined,
    log_text,
    rounds,
    serve,
    wait_for,
)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="flwr is not installed (extra `flower`)"),
    pytest.mark.skipif(not os.environ.get("CHAINFED_FLOWER"), reason="takes minutes; run it with `make flower`"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


def _prepare(root: Path, *, num_rounds: int, deadline: float = 120.0) -> None:
    from chainfed_engine.federation.keys import make_keys

    make_files(root, rounds=num_rounds, deadline=deadline)
    make_keys(root / "keys", SITES, ["fl.example.org"])  # what the server's own processes dial is in it anyway
    # A process of its own, as the sites are: in this one torch has computed already, which changes last bits.
    command = [sys.executable, "-m", "chainfed_engine", "run", root / "all.toml", "--out", root / "in-process"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _same(root: Path) -> bool:
    names = ("served", "in-process")
    served, local = ((root / name / "adapters.safetensors").read_bytes() for name in names)
    return served == local


def test_flower_ends_with_the_bits_of_the_run_in_process_and_refuses_strangers(tmp_path: Path) -> None:
    from chainfed_engine.federation.keys import make_keys

    _prepare(tmp_path, num_rounds=2)
    make_keys(tmp_path / "others", ["stranger"], ["localhost", "127.0.0.1"])  # another authority
    (tmp_path / "stranger.toml").write_text((tmp_path / "clinic.toml").read_text())
    make_keys(tmp_path / "keys", ["unknown"], ["localhost"])  # our authority, a key that is not registered
    (tmp_path / "unknown.toml").write_text((tmp_path / "clinic.toml").read_text())
    port, own, other = free_ports(3)
    server = serve(tmp_path, port, SITES)
    strangers = []
    try:
        with joined(tmp_path, SITES, port):
            strangers = [join(tmp_path, "stranger", port, own, "others"), join(tmp_path, "unknown", port, other)]
            wait_for(lambda: server.poll() is not None, 600, "the end of the run")
        assert server.returncode == 0, log_text(tmp_path)
        assert _same(tmp_path)
        assert "not signed by" in (tmp_path / "join-stranger.log").read_text()
        assert "its key is not registered" in (tmp_path / "join-unknown.log").read_text()
    finally:
        for process in [server, *strangers]:
            end(process)


def test_a_supernode_and_the_superlink_are_killed_and_the_run_ends_with_the_same_adapters(tmp_path: Path) -> None:
    _prepare(tmp_path, num_rounds=5, deadline=150.0)
    (port,) = free_ports(1)
    server = serve(tmp_path, port, SITES)
    try:
        with joined(tmp_path, SITES, port) as sites:
            wait_for(lambda: rounds(tmp_path), 400, "the first round")
            (link,) = children(server.pid, "flower-superlink")
            os.kill(link, signal.SIGKILL)
            wait_for(lambda: len(rounds(tmp_path)) >= 2, 300, "a round after the SuperLink was killed")
            (node,) = children(sites["hospital"].pid, "flower_supernode")
            os.kill(node, signal.SIGKILL)
            wait_for(lambda: server.poll() is not None, 600, "the end of the run")
        assert server.returncode == 0, log_text(tmp_path)
        assert len(rounds(tmp_path)) == 5
        assert all(event["accepted"] for event in rounds(tmp_path))
        assert not any(event["silent"] or event["rejected"] for event in rounds(tmp_path))
        assert _same(tmp_path)
    finally:
        end(server)


def test_a_server_that_is_killed_is_taken_up_by_another_with_the_same_bits(tmp_path: Path) -> None:
    _prepare(tmp_path, num_rounds=3)
    (port,) = free_ports(1)
    server = serve(tmp_path, port, SITES)
    try:
        with joined(tmp_path, SITES, port):
            wait_for(lambda: rounds(tmp_path), 400, "the first round")
            server.kill()
            server.wait(10)
            own = [str(tmp_path / "served"), str(tmp_path / "keys" / "server")]  # in its children's commands alone
            wait_for(lambda: not any(children(1, word) for word in own), 60, "the end of what the server had started")
            said = "expected the server to be there still: nobody listens there"
            wait_for(lambda: said in (tmp_path / "join-clinic.log").read_text(), 60, "a line about the server's end")
            server = serve(tmp_path, port, SITES, "--resume")
            wait_for(lambda: server.poll() is not None, 600, "the end of the run")
        assert server.returncode == 0, log_text(tmp_path)
        assert _same(tmp_path)
        before, after = (tmp_path / "join-clinic.log").read_text().split(said, 1)
        assert " answers\n" in before and " answers\n" in after
        assert "the run is over, it is done; waiting for the next one" in after
    finally:
        end(server)
