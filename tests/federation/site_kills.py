"""Ends a federation of one site at a chosen change to the site's files, and says how it ends when taken up again.

Run as a module: ROOT as deployed.py makes it, a folder to work in, then `all` or shares of the changes from 0 to 1;
`half` in front of one: what was opened last is cut to half its size too. Prints one JSON object a line: the undisturbed
run first. What Python tells its audit hooks counts as a change (a file opened to be written, renamed, removed, a folder
made), so nothing in the engine has to know of this. Each run is a fork of this process, which has imported torch and
never used it.
"""

import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from chainfed_engine.federation import deployment
from chainfed_engine.federation.deployment import serve_rounds
from chainfed_engine.federation.transport_flower import FlowerTransport
from tests.federation.deployed import SITES, DirectCourier, site
from tests.federation.kill_points import KILLED

SITE = SITES[0]
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")


class Changes:
    """Counts changes below `folder`; ends the process at number `stop`."""

    def __init__(self, folder: Path, stop: int | None = None, *, half: bool = False) -> None:
        self.seen: list[str] = []
        self._folder, self._stop, self._half, self._last = f"{folder}{os.sep}", stop, half, ""
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if not isinstance(path, str) or not path.startswith(self._folder):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event == "os.mkdir" and os.path.isdir(path):
            return
        if self._stop == len(self.seen):
            self._stop = None
            if self._half and os.path.exists(self._last):
                os.truncate(self._last, os.path.getsize(self._last) // 2)
            os._exit(KILLED)
        self.seen.append(f"{event} {Path(path).name}")
        self._last = path if event == "open" else self._last


def federation(root: Path, work: Path) -> None:
    """The whole federation in this process, taken up if it was cut off: folders `work/run` and `work/sites`."""
    courier = DirectCourier([site(root, SITE, str(work / "sites"))])

    class Timed(FlowerTransport):
        def __init__(self, given: Any, patience: Any) -> None:
            super().__init__(given, patience, sleep=courier.sleep, now=lambda: courier.now)

    deployment.FlowerTransport = Timed  # type: ignore[misc]
    resume = (work / "run" / "state").is_dir()
    config = str(root / "serve.toml")
    serve_rounds(courier, config_path=config, out=str(work / "run"), sites=[SITE], resume=resume, meet_seconds=1e6)


def forked(do: Callable[[], object]) -> int:
    """Exit code of a fork that does this."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            do()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def report(work: Path, at: str, codes: list[int], changes: list[str]) -> None:
    adapters = work / "run" / "adapters.safetensors"
    digest = hashlib.sha256(adapters.read_bytes()).hexdigest() if adapters.exists() else ""
    leftover = [path.name for path in (work / "sites").rglob("*.partial")]
    line = {"at": at, "codes": codes, "adapters": digest, "leftover": leftover, "changes": changes}
    print(json.dumps(line), flush=True)


def main(root: Path, work: Path, asked: list[str]) -> None:
    import_module("transformers.models.bert.modeling_bert")  # once, not in every fork
    work.mkdir()

    def count() -> None:
        changes = Changes(work / "sites")
        federation(root, work)
        (work / "changes.json").write_text(json.dumps(changes.seen))

    codes = [forked(count)]
    changes = json.loads((work / "changes.json").read_text())
    report(work, "", codes, changes)
    if asked == ["all"]:
        asked = [f"{half}{number / len(changes)!r}" for number in range(len(changes)) for half in ("", "half")]
    for text in asked:
        number, half = round(float(text.removeprefix("half")) * len(changes)), text.startswith("half")
        shutil.rmtree(work)
        work.mkdir()

        def killed(number: int = number, half: bool = half) -> None:
            Changes(work / "sites", number, half=half)
            federation(root, work)

        report(work, text, [forked(killed), forked(lambda: federation(root, work))], changes[number : number + 1])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
