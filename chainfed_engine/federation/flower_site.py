"""`chainfed join`: a site's process with its model, and a SuperNode beside it that is started again when it dies.

In: the site's own CONFIG.toml, its folder, its keys, where the server is. Out: nothing but answers to the server.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chainfed_engine.config_file import load_config
from chainfed_engine.errors import StorageError
from chainfed_engine.federation import flower_starter, flower_supernode
from chainfed_engine.federation.files import make_folder
from chainfed_engine.federation.flower_supernode import POLL_VARIABLE
from chainfed_engine.federation.processes import Child, flower_environment, flower_program
from chainfed_engine.federation.server_watch import ServerWatch
from chainfed_engine.federation.site import Site
from chainfed_engine.federation.site_socket import SiteSocket

# A SuperNode that comes back is refused until the server has noticed that the old one is gone (about 40 seconds); each
# start costs seconds of processor time, so one that is refused again and again is started less and less often.
_AGAIN_SECONDS, _LONGEST_SECONDS = 5.0, 60.0


@dataclass(frozen=True)
class JoinOptions:
    """`keys`: the folder `sites/NAME` that `chainfed keys` made. `port`: of the SuperNode on this machine.
    `poll_seconds`: between two looks for a message, which cost the server a request each."""

    name: str
    config: Path
    out: Path
    keys: Path
    server: str
    port: int = 9094
    poll_seconds: float = 0.5


class FlowerSite:
    """Owns the socket, the SuperNode and what starts its processes; a context manager."""

    def __init__(self, options: JoinOptions) -> None:
        for name in ("ca.crt", "site.key"):
            if not (options.keys / name).is_file():
                raise StorageError(
                    f"{options.keys / name}: not found; expected the folder of this site that `chainfed keys` made"
                )
        program = flower_program(flower_starter.PROGRAM)
        flower_program("flower-supernode")
        self._site = Site(options.name, load_config(options.config), options.out)
        self._socket = SiteSocket(self._site)
        folder = options.out / "flower"
        make_folder(folder / "home")
        starter = self._socket.path.with_name("starter")
        programs = flower_starter.install(self._socket.path.with_name("bin"), starter, program)
        environment = flower_environment(folder / "home", programs)
        environment[POLL_VARIABLE] = str(options.poll_seconds)
        log, python = folder / "supernode.log", [sys.executable, "-m"]
        command = [*python, flower_supernode.__name__, "--root-certificates", str(options.keys / "ca.crt")]
        command += ["--superlink", options.server, "--auth-supernode-private-key", str(options.keys / "site.key")]
        command += ["--host", "127.0.0.1", "--port", str(options.port)]
        command += ["--node-config", f'socket="{self._socket.path}"']
        self.supernode = Child(command, environment, log)
        self._starter = Child([*python, flower_starter.__name__, str(starter)], environment, log)
        self._name, self._server, self._log = options.name, options.server, log
        self._watch = ServerWatch(options.name, options.server, options.keys / "ca.crt", log)

    def __enter__(self) -> "FlowerSite":
        return self

    def __exit__(self, *_: object) -> None:
        self.supernode.stop()
        self._starter.stop()
        self._socket.close()
        self._site.close()

    def run(self, *, until: Callable[[], bool] = lambda: False) -> None:
        """Answer messages for ever, or until `until` says so; what is wrong with the server goes to standard error."""
        refused = 0  # starts since the server answered last
        while not until():
            self._starter.keep_running()
            before = self.supernode.starts
            self.supernode.keep_running(after_seconds=min(_AGAIN_SECONDS * 2 ** min(refused, 8), _LONGEST_SECONDS))
            line = self._watch.look()
            refused = 0 if self._watch.trouble is None else refused + self.supernode.starts - before
            if line is None and self.supernode.starts > max(before, 1) and self._watch.trouble is None:
                line = f"{self._name}: Flower's SuperNode ended and was started again; {self._log} says why"
            if line is not None:
                _say(line)
            self._socket.serve_once()
            ended = self._site.run_ended
            if ended is not None and not self._watch.run_ended:
                _say(f"{self._name}: {self._server}: the run is over, {ended}; waiting for the next one until Ctrl-C")
            self._watch.run_ended = ended is not None


def _say(line: str) -> None:
    print(f"chainfed: {line}", file=sys.stderr, flush=True)
