"""Flower's processes as children of ours: started, watched, started again when they die, ended with us.

In: command lines; out: log files in a folder. A child runs in a session of its own, so that ending it ends what it has
started, and is ended by the kernel when this process dies (Linux). Flower's habit of calling home is switched off.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from chainfed_engine.errors import ChainfedError, NativeUnavailable
from chainfed_engine.federation.files import OWNER_ONLY_FILE, make_folder

_PR_SET_PDEATHSIG = 1
_WATCH_SECONDS = 0.5
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds; a message waits half of it on average
}


def flower_environment(home: Path, *programs: Path) -> dict[str, str]:
    """Environment of Flower's programs: its own folder, no calls to the internet; on PATH the folders `programs` come
    first, then our interpreter's."""
    path = os.pathsep.join([*map(str, programs), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path}


def flower_program(name: str) -> str:
    """Path of one of Flower's programs. Raises NativeUnavailable where Flower is not installed."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise NativeUnavailable(f"{name}: not found; install Flower: pip install 'chainfed-engine[flower]'")
    return found


class Child:
    """One program that is to run until `stop`. `log`: where its output goes, appended."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._command, self._environment, self._log = list(command), dict(environment), log
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self.starts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def keep_running(self, *, after_seconds: float = 2.0) -> None:
        """Start it if it does not run, and again when it died, not more often than every `after_seconds`."""
        if self._process is not None and self._process.poll() is None:
            return
        if self._process is not None:
            self._end_group()  # what it had started and left behind
        if time.monotonic() - self._started < after_seconds and self.starts:
            return
        make_folder(self._log.parent)
        self._started = time.monotonic()
        self.starts += 1
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, OWNER_ONLY_FILE)
        try:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        finally:
            os.close(descriptor)

    def stop(self, *, seconds: float = 10.0) -> None:
        """End it and everything it has started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(seconds)
        self._end_group()
        self._process = None

    def _end_group(self) -> None:
        """Kill what is left of the group; its leader was waited for, so the group is ours or gone."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def run_once(command: Sequence[str], environment: Mapping[str, str], *, seconds: float) -> str:
    """A program to its end; its output. Raises ChainfedError with the last lines where it fails."""
    try:
        result = subprocess.run(
            list(command), env=dict(environment), capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise ChainfedError(f"{Path(command[0]).name}: no end after {seconds:g} seconds") from None
    output = result.stdout + result.stderr
    if result.returncode != 0:
        last = " ".join(output.split())[-600:]
        raise ChainfedError(f"{' '.join([Path(command[0]).name, *command[1:3]])}: exit {result.returncode}: {last}")
    return output


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def end_with(pid: int) -> None:
    """End this process, however it stands, soon after process `pid` has ended: a run that nobody owns must not go on
    beside its successor, and what a crash does to it is made good by the next start."""

    def watch() -> None:
        while lives(pid):
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
