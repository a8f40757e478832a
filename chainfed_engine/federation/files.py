"""Files of a run on disk: written to a sibling, fsynced, renamed; read with every promise checked. No pickle.

In and out: NumPy arrays and JSON-able dicts. A safetensors file of ours carries its scalars as JSON in the metadata,
with a SHA-256 over all arrays, so that one rename makes both current and damage cannot pass unseen. What is written is
readable by its owner alone. Every change that a run makes to the file system goes through this module, and each of them
passes `reach` first: tests end the process at every one of these points and take the run up again.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from chainfed_engine.errors import CorruptFile, StorageError
from chainfed_engine.types import Arrays

_METADATA_KEY = "chainfed"
OWNER_ONLY_FILE, OWNER_ONLY_FOLDER = 0o600, 0o700

# (what is about to happen, to which path, the bytes that an append will add). None outside of tests.
FaultPoint = Callable[[str, Path, bytes], None]
fault_point: FaultPoint | None = None


def reach(operation: str, path: Path, data: bytes = b"") -> None:
    """A place at which a test may end the process."""
    if fault_point is not None:
        fault_point(operation, path, data)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8); after a crash it is either the old or the new."""
    _replace(path, lambda sibling: sibling.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Replace `path` by the parts one after another; after a crash it is either the old or the new."""

    def write(sibling: Path) -> None:
        with open(sibling, "wb") as file:
            file.writelines(parts)

    _replace(path, write)


def write_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any], *, durable: bool = True
) -> str:
    """Replace `path` by a safetensors file of `arrays` and `record`; returns the SHA-256 of the arrays.

    `durable` False: no fsync. The file survives the death of the process, not a power cut, after which its checksum
    tells that it is damaged.
    """
    digest = arrays_digest(arrays)
    metadata = {_METADATA_KEY: json.dumps({"arrays_sha256": digest, "record": record}, allow_nan=False)}
    _replace(path, lambda sibling: save_file(dict(arrays), sibling, metadata), durable=durable)
    return digest


def append(stream: BinaryIO, path: Path, data: bytes) -> None:
    """Hand `data` to the system at once; a crash may leave a part of it."""
    with storage_errors(path, "append"):
        reach("append", path, data)
        stream.write(data)
        stream.flush()


def cut(stream: BinaryIO, path: Path, length: int) -> None:
    """Keep the first `length` bytes."""
    with storage_errors(path, "cut"):
        reach("cut", path)
        stream.truncate(length)


def sync(stream: BinaryIO, path: Path) -> None:
    """Make what was appended last through a power cut."""
    with storage_errors(path, "write"):
        reach("sync", path)
        os.fsync(stream.fileno())


def open_append(path: Path) -> BinaryIO:
    """A file to append to, readable by its owner alone."""
    with storage_errors(path, "create"):
        reach("open", path)
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, OWNER_ONLY_FILE), "ab")


def remove(path: Path) -> None:
    """Remove a file; harmless if it is gone."""
    with storage_errors(path, "remove"):
        reach("remove", path)
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, that its owner alone can look into; one that is there stays as it is."""
    with storage_errors(path, "create"):
        reach("make folder", path)
        for folder in [*reversed(path.parents), path]:
            if not folder.exists():
                folder.mkdir(mode=OWNER_ONLY_FOLDER, exist_ok=True)
        path.mkdir(exist_ok=True)  # says so if it is a file


def read_arrays(path: Path) -> tuple[Arrays, dict[str, Any], str]:
    """Arrays, record and SHA-256 of the arrays. Raises CorruptFile where anything does not hold, StorageError."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        content = json.loads(metadata[_METADATA_KEY])
        digest, record = content["arrays_sha256"], content["record"]
    except OSError as error:
        raise StorageError(f"{path}: cannot read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptFile(
            f"{path}: expected a complete file of this engine, got one that is damaged: {error}"
        ) from error
    if not isinstance(record, dict) or digest != arrays_digest(arrays):
        raise CorruptFile(f"{path}: the checksum of its arrays does not match; the file is damaged")
    return arrays, record, digest


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in key order."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype.str} {array.shape};".encode())
        digest.update(array.data)
    return digest.hexdigest()


@contextlib.contextmanager
def storage_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn the file system's refusals into StorageError with the path."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        is_full = any(os.strerror(code) in reason for code in (errno.ENOSPC, errno.EDQUOT))
        remedy = "make room or choose another folder" if is_full else "choose another path or correct its permissions"
        raise StorageError(f"{path}: cannot {doing}: {reason}; {remedy}") from error


def _replace(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    sibling = path.with_name(f".{path.name}.partial")
    with storage_errors(path, "write"):
        try:
            reach("write", sibling)
            write(sibling)
            os.chmod(sibling, OWNER_ONLY_FILE)
            reach("sync", sibling)
            if durable:
                fsync(sibling)
            reach("rename", path)
            os.replace(sibling, path)
        except BaseException:
            sibling.unlink(missing_ok=True)
            raise
        reach("sync folder", path.parent)
        if durable:
            fsync(path.parent)


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
