"""Real processes on 127.0.0.1: `chainfed serve` and `chainfed join` as a user starts them, ended by process id."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def start(log: Path, *arguments: object) -> "subprocess.Popen[bytes]":
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "chainfed_engine", *map(str, arguments)],
            env=environment,
            stdout=output,
            stderr=output,
            cwd=log.parent,
        )


def end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@contextlib.contextmanager
def joined(root: Path, names: tuple[str, ...], port: int) -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    """Sites that try to reach a server at `port`."""
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, own_port in zip(names, free_ports(len(names)), strict=True):
            processes[name] = join(root, name, port, own_port)
        yield processes
    finally:
        for process in processes.values():
            end(process)


def join(root: Path, name: str, port: int, own_port: int, keys: str = "keys") -> "subprocess.Popen[bytes]":
    arguments = ["join", root / f"{name}.toml", "--name", name, "--out", root / f"site-{name}"]
    arguments += ["--keys", root / keys / "sites" / name, "--server", f"127.0.0.1:{port}", "--port", own_port]
    return start(root / f"join-{name}.log", *arguments)


def serve(root: Path, port: int, sites: tuple[str, ...], *more: str) -> "subprocess.Popen[bytes]":
    arguments = ["serve", root / "serve.toml", "--out", root / "served", "--keys", root / "keys" / "server"]
    arguments += ["--sites", ",".join(sites), "--listen", f"127.0.0.1:{port}", *more]
    return start(root / "serve.log", *arguments)


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    until = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until, f"not within {seconds:g} seconds: {what}"
        time.sleep(0.2)


def rounds(root: Path) -> list[dict[str, Any]]:
    path = root / "served" / "metrics.jsonl"
    if not path.exists():
        return []
    events = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [event for event in events if event["event"] == "round"]


def children(pid: int, word: str) -> list[int]:
    """Process ids below `pid` whose command line names `word`."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) if entry.name.isdigit() else -1
            if parent == pid:
                if word in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(entry.name))
                found += children(int(entry.name), word)
    return found


def log_text(root: Path) -> str:
    """The ends of all logs, for a failing test."""
    paths = [*root.glob("*.log"), *root.glob("*/flower/*.log")]
    return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-1500:]}" for path in paths)
