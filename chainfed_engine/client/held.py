"""The global parameters a client holds: what tasks brought, kept until a newer version comes. References, no copies.

With a folder they outlive the process: one file a version, named by it, so that a client that returns after any number
of rounds is sent only what it lacks. A version is the fingerprint of the array it names (`update_format.py`), and a
file that does not keep it is thrown away, never used.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from chainfed_engine import stand_in
from chainfed_engine.errors import InvalidArgument, StorageError
from chainfed_engine.types import Arrays, Task
from chainfed_engine.update_format import fingerprint

_VERSION = re.compile(r"[0-9a-f]{32}")
_MAX_KEPT = 4096  # files; more than any chain has parameters, and a bound on what a hostile server can make us keep


class HeldParameters:
    """`folder` None: in memory alone."""

    def __init__(self, folder: Path | None = None) -> None:
        self._arrays: Arrays = {}
        self._versions: dict[str, str] = {}
        self._folder = folder
        if folder is not None:
            self._load(folder)

    @property
    def versions(self) -> dict[str, str]:
        """Parameter -> version, of everything held."""
        return dict(self._versions)

    def take(self, task: Task) -> Arrays:
        """Merge what the task brings; returns exactly the parameters it names. Raises InvalidArgument for a gap:
        the server believes in something this client does not hold, and sends all of it after the error."""
        for key, array in task.arrays.items():
            version = task.versions.get(key)
            if version is None:
                raise InvalidArgument(f"task {task.round_id}: {key} came without a version")
            if self._folder is not None:
                array = self._keep(key, array, version)
            self._arrays[key], self._versions[key] = array, version
        lacking = [key for key, version in task.versions.items() if self._versions.get(key) != version]
        if lacking:
            raise InvalidArgument(
                f"task {task.round_id}: {len(lacking)} parameters are missing here, first {lacking[0]}"
            )
        self._drop_other_large_stand_ins(task.versions)
        if self._folder is not None:
            self._drop_old(self._folder)
        return {key: self._arrays[key] for key in task.versions}

    def forget_outdated(self, current: Mapping[str, str]) -> None:
        """Let go of arrays that have a newer version: no task will name the old one again."""
        for key, version in current.items():
            if key in self._versions and self._versions[key] != version:
                del self._versions[key], self._arrays[key]

    def _drop_other_large_stand_ins(self, named: Mapping[str, str]) -> None:
        """The server has let go of a large map by the time it names another."""
        if any(key.startswith(stand_in.KEY_PREFIX) for key in named):
            large = stand_in.large_depths({key: value for key, value in self._arrays.items() if key not in named})
            for key in [key for key in self._arrays if key.startswith(stand_in.KEY_PREFIX) and key not in named]:
                if int(key.split(".")[1]) in large:
                    del self._arrays[key], self._versions[key]

    def _keep(self, key: str, array: np.ndarray, version: str) -> np.ndarray:
        """Write one array under its version and key; returns a copy that outlives the message."""
        if not _VERSION.fullmatch(version) or fingerprint(array) != version:
            raise InvalidArgument(f"{key}: the array does not have the version that the task names; it was damaged")
        assert self._folder is not None
        path = self._folder / f"{version}.{_file_part(key)}"
        sibling = path.with_suffix(".partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(os.open(sibling, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                # Not synced: what a power cut leaves of it does not keep its version.
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
            os.replace(sibling, path)
        except OSError as error:
            raise StorageError(f"{path}: cannot keep an adapter: {error.strerror or error}; free space") from error
        return np.array(array, copy=True)

    def _drop_old(self, folder: Path) -> None:
        wanted = {f"{version}.{_file_part(key)}" for key, version in self._versions.items()}
        for path in _files(folder):
            if path.name not in wanted:
                path.unlink(missing_ok=True)

    def _load(self, folder: Path) -> None:
        """Every whole file; the newest of a key's versions, if a crash left two."""
        paths = sorted(_files(folder), key=lambda path: path.stat().st_mtime_ns)
        for path in paths[-_MAX_KEPT:]:
            version, _, part = path.name.partition(".")
            array = _read(path) if _VERSION.fullmatch(version) else None
            key = _key(part)
            if array is None or key is None or fingerprint(array) != version:
                path.unlink(missing_ok=True)
                continue
            self._arrays[key], self._versions[key] = array, version


def _files(folder: Path) -> list[Path]:
    """None before the first task that brings something."""
    return list(folder.iterdir()) if folder.is_dir() else []


def _read(path: Path) -> np.ndarray | None:
    with contextlib.suppress(OSError, ValueError, EOFError, MemoryError, SyntaxError), open(path, "rb") as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        return array
    return None


def _file_part(key: str) -> str:
    """A parameter's key as the end of a file name; keys are dotted names of letters, digits and underscores."""
    if not re.fullmatch(r"[A-Za-z0-9_.]{1,120}", key) or key.endswith(".partial"):
        raise InvalidArgument(f"expected the name of a parameter, got {key!r:.80}")
    return f"{key}.npy"


def _key(part: str) -> str | None:
    return part.removesuffix(".npy") if part.endswith(".npy") else None
