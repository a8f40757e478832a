"""The directory of one run: config.toml, metrics.jsonl, adapters.safetensors, state/. Owns the files and a lock.

Metrics lines are appended before the state of their round is saved; when a run is taken up again, lines after the
saved round are cut, so that the file reads as if nothing had happened. `state/` keeps the last two states: if the newer
one does not survive a power cut whole, the older one serves, and `load` says so. `state/received/` keeps the replies of
the exchange under way (see journal.py) until its state is saved.
"""

import fcntl
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from chainfed_engine.errors import CorruptFile, InvalidArgument, StorageError
from chainfed_engine.federation import files
from chainfed_engine.federation.files import read_arrays, storage_errors, write_arrays, write_text
from chainfed_engine.federation.journal import Journal
from chainfed_engine.types import Arrays, Task

NOISE_KEY_FILE = "noise.key"
ADAPTERS_FORMAT = "chainfed-adapters"
ADAPTERS_VERSION = 2  # 1: bottlenecks of pre-norm models read rows of any size
Event = dict[str, Any]
_STATE_NAME = re.compile(r"state-(\d{8})\.safetensors")
_STAND_IN_PREFIX = "stand_in."
_STAND_IN_NAME = re.compile(r"stand_in-\d{4}\.safetensors")


@dataclass(frozen=True)
class SavedState:
    """What `Server.restore` takes. `skipped`: newer states that were damaged, one reason each."""

    arrays: Arrays
    record: dict[str, Any]
    skipped: tuple[str, ...]


class RunDirectory:
    """`resume` False: start a run in a new or empty folder; True: take up the one that is there.

    `config_text`: what config.toml shall say (None: leave it); with `resume` it is written by `keep_config`, once the
    saved state was found to belong to it. Raises StorageError when the folder is in use by another run or not writable,
    InvalidArgument when a run is there and `resume` is False or none is and it is True.
    """

    def __init__(self, path: str | Path, *, config_text: str | None = None, resume: bool = False) -> None:
        self.path = Path(path)
        self._state_path = self.path / "state"
        self._received_path = self._state_path / "received"
        self._metrics_path = self.path / "metrics.jsonl"
        self._number = 0  # of the last saved state
        self._num_recorded = 0
        self._stand_in_digests: dict[str, str] = {}  # file in state/ -> sha256 of what it holds
        self._config_text = config_text
        check_free(self.path, resume=resume)
        files.make_folder(self.path)
        with storage_errors(self.path, "create"):
            self._lock = self._take_lock()
        try:
            check_free(self.path, resume=resume)  # again, under the lock
            files.make_folder(self._state_path)
            files.make_folder(self._received_path)
            self._metrics = files.open_append(self._metrics_path)
            for unfinished in [*self.path.glob(".*.partial"), *self._state_path.rglob(".*.partial")]:
                files.remove(unfinished)
            if not resume:
                self.keep_config()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another run have the folder."""
        if not self._metrics.closed:
            self._metrics.close()
            os.close(self._lock)

    def keep_config(self) -> None:
        """Write config.toml."""
        if self._config_text is not None:
            write_text(self.path / "config.toml", self._config_text)

    # -- metrics -------------------------------------------------------------------------------------------------

    def record(self, event: Event) -> None:
        """Append one line to metrics.jsonl and hand it to the system at once."""
        line = json.dumps(event, allow_nan=False, separators=(", ", ": "))
        files.append(self._metrics, self._metrics_path, line.encode() + b"\n")
        self._num_recorded += 1

    def cut_events(self, keep: Callable[[Event], bool]) -> list[Event]:
        """Drop metrics from the first incomplete line, or line that `keep` refuses, on; returns what stays."""
        kept: list[Event] = []
        length = 0
        with storage_errors(self._metrics_path, "read"):
            for line in self._metrics_path.read_bytes().splitlines(keepends=True):
                event = _parse_event(line)
                if event is None or not keep(event):
                    break
                kept.append(event)
                length += len(line)
        files.cut(self._metrics, self._metrics_path, length)
        return kept

    def recorded(self) -> list[Event]:
        """What was recorded since this run was begun or taken up, read again: kept, it would grow with every round."""
        with storage_errors(self._metrics_path, "read"):
            lines = self._metrics_path.read_bytes().splitlines(keepends=True)
        newest = lines[len(lines) - self._num_recorded :]
        return [event for line in newest if (event := _parse_event(line)) is not None]

    # -- state ---------------------------------------------------------------------------------------------------

    def save(self, state: tuple[Mapping[str, np.ndarray], Mapping[str, Any]]) -> None:
        """Make `Server.state()` the one to resume from. A stand-in never changes once fitted and is written once."""
        arrays, record = state
        files.sync(self._metrics, self._metrics_path)
        trained: Arrays = {}
        stand_ins: dict[str, Arrays] = {}
        for key, array in arrays.items():
            if key.startswith(_STAND_IN_PREFIX):
                stand_ins.setdefault(f"stand_in-{int(key.split('.')[1]):04d}.safetensors", {})[key] = array
            else:
                trained[key] = array
        # One that was let go and is fitted anew is another one; no state that is still kept names the old one then.
        self._stand_in_digests = {name: sha for name, sha in self._stand_in_digests.items() if name in stand_ins}
        for name in stand_ins.keys() - self._stand_in_digests.keys():
            self._stand_in_digests[name] = write_arrays(self._state_path / name, stand_ins[name], {})
        number = self._number + 1
        digests = {name: self._stand_in_digests[name] for name in sorted(stand_ins)}
        write_arrays(self._state_file(number), trained, {"server": record, "stand_in_sha256": digests})
        self._number = number
        for other in self._state_numbers():
            if other not in (number, number - 1):
                files.remove(self._state_file(other))
        self.forget_received()

    def noise_key(self) -> bytes:
        """32 random bytes of this run, made once: who knows them can take the noise of a private run off again."""
        path = self._state_path / NOISE_KEY_FILE
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            key = secrets.token_bytes(32)
            files.write_bytes(path, [key])
        if len(key) != 32:
            raise CorruptFile(f"{path}: expected 32 bytes, got {len(key)}; start a new run")
        return key

    def journal(self, tasks: Sequence[Task]) -> Journal:
        """What was received of this exchange before a crash, and where its replies are to be kept."""
        return Journal(self._received_path, tasks)

    def forget_received(self) -> None:
        """The exchange that the kept replies belong to is over."""
        Journal.clear(self._received_path)

    def load(self) -> SavedState | None:
        """The newest state that is whole; None if none was saved yet. Raises CorruptFile if none is whole."""
        skipped: list[str] = []
        for number in sorted(self._state_numbers(), reverse=True):
            try:
                arrays, record, _ = read_arrays(self._state_file(number))
                stand_ins = self._load_stand_ins(record.get("stand_in_sha256"))
                server_record = record.get("server")
                if not isinstance(server_record, dict):
                    raise CorruptFile(f"{self._state_file(number)}: holds no server record")
            except CorruptFile as error:
                skipped.append(str(error))
                continue
            self._number = number
            return SavedState({**arrays, **stand_ins}, server_record, tuple(skipped))
        if skipped:
            raise CorruptFile(f"{self._state_path}: no state is whole; start a new run ({'; '.join(skipped)})")
        return None

    def _load_stand_ins(self, digests: object) -> Arrays:
        if not isinstance(digests, dict) or not all(_STAND_IN_NAME.fullmatch(str(name)) for name in digests):
            raise CorruptFile(f"{self._state_path}: a state that names no stand-ins")
        stand_ins: Arrays = {}
        for name, digest in digests.items():
            path = self._state_path / name
            if not path.is_file():
                raise CorruptFile(f"{path}: missing, but the state needs it")
            arrays, _, found = read_arrays(path)
            if found != digest:
                raise CorruptFile(f"{path}: belongs to another state")
            stand_ins |= arrays
        self._stand_in_digests = dict(digests)
        return stand_ins

    def _state_file(self, number: int) -> Path:
        return self._state_path / f"state-{number:08d}.safetensors"

    def _state_numbers(self) -> list[int]:
        names = (_STATE_NAME.fullmatch(entry.name) for entry in self._state_path.iterdir())
        return [int(name[1]) for name in names if name]

    # -- result --------------------------------------------------------------------------------------------------

    def save_adapters(self, parameters: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        """Write adapters.safetensors: all adapters and the classifier, what evaluation and export read."""
        record = {"format": ADAPTERS_FORMAT, "version": ADAPTERS_VERSION, **about}
        write_arrays(self.path / "adapters.safetensors", parameters, record)

    def _take_lock(self) -> int:
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, files.OWNER_ONLY_FILE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise StorageError(f"{self.path}: in use by another run; wait for it or choose another folder") from error
        return descriptor


def check_free(path: Path, *, resume: bool) -> None:
    """Raises InvalidArgument when a run is there and `resume` is False, or none is and it is True."""
    if resume and not (path / "state").is_dir():
        raise InvalidArgument(f"{path}: no run to resume here; start one without --resume")
    if not resume and ((path / "metrics.jsonl").exists() or (path / "state").exists()):
        raise InvalidArgument(f"{path}: holds a run already; take it up with --resume or choose another folder")


def read_adapters(path: str | Path) -> tuple[Arrays, dict[str, Any]]:
    """Adapters and classifier of a run directory, float32, and what was recorded about them."""
    file = Path(path) / "adapters.safetensors"
    if not file.is_file():
        raise StorageError(f"{file}: not found; expected the directory of a run that was evaluated or finished")
    try:
        arrays, record, _ = read_arrays(file)
    except CorruptFile as error:
        raise CorruptFile(f"{error}; take the run up with --resume, which writes it again") from error
    if record.get("format") != ADAPTERS_FORMAT or record.get("version") != ADAPTERS_VERSION:
        raise CorruptFile(
            f"{file}: expected format {ADAPTERS_FORMAT} version {ADAPTERS_VERSION}, got {record.get('format')!r:.60} "
            f"version {record.get('version')!r:.20}; install the version of chainfed-engine that wrote it"
        )
    if any(array.dtype != np.float32 for array in arrays.values()):
        raise CorruptFile(f"{file}: expected float32 arrays only")
    return arrays, record


def _parse_event(line: bytes) -> Event | None:
    if not line.endswith(b"\n"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
