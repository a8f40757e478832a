"""`chainfed serve`: SuperLink and SuperExec as children, the app submitted, the run watched to its end.

In: CONFIG.toml, run directory, keys, the sites' names. Out: the run directory, as `chainfed run` writes it. Whatever
dies is started again: the SuperLink on its database, the SuperExec, and the run itself from its last saved state.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainfed_engine.config_file import load_config
from chainfed_engine.errors import ChainfedError, ConfigError, StorageError
from chainfed_engine.federation import flower_commands
from chainfed_engine.federation.deployment import OUTCOME_FILE, check_deployable
from chainfed_engine.federation.files import make_folder, write_text
from chainfed_engine.federation.processes import Child, flower_environment, flower_program, lives, run_once
from chainfed_engine.federation.run_directory import check_free

APP = Path(__file__).parent / "flower_app"
_START_SECONDS, _COMMAND_SECONDS, _WATCH_SECONDS = 400.0, 300.0, 0.3
MAX_RESTARTS = 10  # of the run


@dataclass(frozen=True)
class ServeOptions:
    """`keys`: the folder `server` that `chainfed keys` made. `meet_seconds`: how long to wait for all sites."""

    config: Path
    out: Path
    keys: Path
    sites: Sequence[str]
    host: str = "127.0.0.1"
    port: int = 8000
    resume: bool = False
    meet_seconds: float = 600.0


def reached_at(host: str) -> str:
    """Where the server's own processes dial it. A certificate names machines: who listens on all addresses is dialled
    at this machine's own."""
    return "127.0.0.1" if host == "0.0.0.0" else host


class FlowerServer:
    """Owns its children from `start` to `stop`; a context manager."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        check_deployable(load_config(options.config))
        check_free(options.out, resume=options.resume)
        self._folder = options.out / "flower"
        keys = options.keys
        self._certificate = keys / "ca.crt"
        for name in ("ca.crt", "server.crt", "server.key", "superexec.secret"):
            if not (keys / name).is_file():
                raise StorageError(f"{keys / name}: not found; expected the folder `server` that `chainfed keys` made")
        for site in options.sites:
            if not (keys / "sites" / f"{site}.pub").is_file():
                raise ConfigError(f"site {site}: no key in {keys / 'sites'}; make one with `chainfed keys`")
        self._environment = flower_environment(self._folder / "home")
        address = f"{reached_at(options.host)}:{options.port}"
        secret = ["--superexec-auth-secret-file", str(keys / "superexec.secret")]
        link = [flower_program("flower-superlink"), "--host", options.host, "--port", str(options.port)]
        link += ["--ssl-ca-certfile", str(self._certificate), "--ssl-certfile", str(keys / "server.crt")]
        link += ["--ssl-keyfile", str(keys / "server.key"), "--enable-supernode-auth", "--isolation", "process"]
        link += ["--database", str(self._folder / "link.db"), "--disable-runtime-dependency-installation", *secret]
        executor = [flower_program("flower-superexec"), "--runtime-api-address", address, *secret]
        executor += ["--root-certificates", str(self._certificate)]
        self.superlink = Child(link, self._environment, self._folder / "superlink.log")
        self.superexec = Child(executor, self._environment, self._folder / "superexec.log")
        self._address = address

    def __enter__(self) -> "FlowerServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Both children, the sites' keys registered, the run submitted."""
        make_folder(self._folder / "home")
        certificate = json.dumps(str(self._certificate.absolute()))
        text = f'[superlink]\ndefault = "run"\n[superlink.run]\naddress = "{self._address}"\n'
        write_text(self._folder / "home" / "config.toml", f"{text}root-certificates = {certificate}\n")
        self._wait_for_link()
        sites = {site: self._options.keys / "sites" / f"{site}.pub" for site in self._options.sites}
        self._submit({site: str(path.absolute()) for site, path in sites.items()}, resume=self._options.resume)

    def watch(self, *, on_event: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        """Until the run is done. Raises ChainfedError with the run's own line where it failed."""
        lines = _Lines(self._options.out / "metrics.jsonl", skip=self._options.resume)
        restarts = 0
        while True:
            self._keep_children()
            for event in lines.new():
                if on_event is not None:
                    on_event(event)
            outcome = self._outcome()
            if outcome["status"] == "done":
                return
            if outcome["status"] == "failed":
                raise ChainfedError(outcome["error"])
            if outcome["status"] == "running" and not lives(outcome["pid"]):
                restarts += 1
                if restarts > MAX_RESTARTS:
                    raise ChainfedError(f"the run's process died {restarts} times; see {self._folder}/superexec.log")
                self._submit({}, resume=(self._options.out / "state").is_dir())
            time.sleep(_WATCH_SECONDS)

    def stop(self) -> None:
        self.superexec.stop()
        self.superlink.stop()

    def _keep_children(self) -> None:
        self.superlink.keep_running()
        self.superexec.keep_running()

    def _wait_for_link(self) -> None:
        until = time.monotonic() + _START_SECONDS
        host, port = ("127.0.0.1" if self._options.host == "0.0.0.0" else self._options.host), self._options.port
        while True:
            self._keep_children()
            try:
                socket.create_connection((host, port), 1.0).close()
                return
            except OSError:
                time.sleep(0.1)
            if time.monotonic() > until:
                raise ChainfedError(
                    f"the SuperLink did not start within {_START_SECONDS:g} seconds; see {self._folder}"
                )

    def _submit(self, keys: Mapping[str, str], *, resume: bool) -> None:
        """Register keys (site -> file; those that are registered already are left as they are) and submit the run."""
        options = self._options
        write_text(options.out / OUTCOME_FILE, json.dumps({"status": "submitted", "error": "", "pid": 0}))
        settings = {
            "config": str(options.config.absolute()),
            "out": str(options.out.absolute()),
            "sites": ",".join(options.sites),
            "resume": resume,
            "meet-seconds": options.meet_seconds,
            "owner-pid": os.getpid(),
        }
        given = [text for name, value in settings.items() for text in ("-c", f"{name}={json.dumps(value)}")]
        request = json.dumps({"register": dict(keys), "run": [str(APP), "run", *given]})
        command = [sys.executable, "-m", flower_commands.__name__, request]
        run_once(command, self._environment, seconds=_COMMAND_SECONDS)

    def _outcome(self) -> dict[str, Any]:
        try:
            outcome = json.loads((self._options.out / OUTCOME_FILE).read_text(encoding="utf-8"))
            return {"status": str(outcome["status"]), "error": str(outcome["error"]), "pid": int(outcome["pid"])}
        except (OSError, ValueError, KeyError, TypeError):
            return {"status": "submitted", "error": "", "pid": 0}


class _Lines:
    """New whole lines of metrics.jsonl as events; a file that got shorter is read from where it now ends."""

    def __init__(self, path: Path, *, skip: bool) -> None:
        self._path = path
        self._read = path.stat().st_size if skip and path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        try:
            size = self._path.stat().st_size
            with open(self._path, "rb") as file:
                self._read = min(self._read, size)
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
