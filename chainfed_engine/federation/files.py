"""Files of a run on disk: written to a sibling, fsynced, renamed; read with every promise checked. No pickle.

In and out: NumPy arrays and JSON-able dicts. A safetensors file of ours carries its scalars as JSON in the metadata,
with a SHA-256 over all arrays, so that one rename makes both current and damage cannot pass unseen.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from chainfed_engine.errors import CorruptFile, StorageError
from chainfed_engine.types import Arrays

_METADATA_KEY = "chainfed"


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8); after a crash it is either the old or the new."""
    _replace(path, lambda sibling: sibling.write_text(text, encoding="utf-8"))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> str:
    """Replace `path` by a safetensors file of `arrays` and `record`; returns the SHA-256 of the arrays."""
    digest = arrays_digest(arrays)
    metadata = {_METADATA_KEY: json.dumps({"arrays_sha256": digest, "record": record}, allow_nan=False)}
    _replace(path, lambda sibling: save_file(dict(arrays), sibling, metadata))
    return digest


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
    except OSError as error:
        raise StorageError(
            f"{path}: cannot {doing}: {error.strerror or error}; free space or choose another folder"
        ) from error
    except SafetensorError as error:
        raise StorageError(f"{path}: cannot {doing}: {error}; free space or choose another folder") from error


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    sibling = path.with_name(f".{path.name}.partial")
    with storage_errors(path, "write"):
        try:
            write(sibling)
            _fsync(sibling)
            os.replace(sibling, path)
        except BaseException:
            sibling.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
