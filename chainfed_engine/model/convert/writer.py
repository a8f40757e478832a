"""One file of a store, written block by block: to a sibling, hashed, fsynced, renamed.

Enters: a `FilePlan`. Leaves: the finished file and its record for store.json. Memory: one block of rows of one tensor,
and 32 MiB of the file in the page cache.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chainfed_engine.errors import StorageError
from chainfed_engine.model.convert.plan import FilePlan, TensorPlan
from chainfed_engine.model.convert.source import AnyArray, rows_per_block
from chainfed_engine.model.format import sha256_of
from chainfed_engine.model.layout import matrix_layout
from chainfed_engine.model.store_file import FileLayout, TensorEntry, layout_file

Progress = Callable[[str, int, int], None]  # file being written, bytes done, bytes in all
TEMPORARY_SUFFIX = ".tmp"
_UNSYNCED_BYTES = 32 << 20  # an embedding is half a gigabyte: its pages must not wait for the end of the file


@dataclass(frozen=True)
class FileRecord:
    name: str
    file_bytes: int
    sha256: str


@contextmanager
def storage_errors(path: Path, bytes_needed: int) -> Iterator[None]:
    """Turn the operating system's refusals into StorageError; a full disk also names the bytes needed and free."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path, bytes_needed) from error
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def disk_full(path: Path, bytes_needed: int) -> StorageError:
    free = shutil.disk_usage(path if path.is_dir() else path.parent).free
    return StorageError(
        f"{path}: the disk is full: {bytes_needed} bytes needed, {free} free; make room and run again "
        "(finished files are kept)"
    )


def plan_layout(plan: FilePlan) -> FileLayout:
    return layout_file([tensor.spec for tensor in plan.tensors])


def write_store_file(folder: Path, plan: FilePlan, advance: Callable[[int], None]) -> FileRecord:
    """Write `plan` to `folder`; `advance` gets the bytes of every block written."""
    layout = plan_layout(plan)
    path = folder / plan.name
    temporary = folder / (plan.name + TEMPORARY_SUFFIX)
    with storage_errors(path, layout.file_bytes):
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.truncate(descriptor, layout.file_bytes)  # the gaps between tensors read as zeros
            _pwrite_all(descriptor, memoryview(layout.header), 0)
            written = 0

            def count(num_bytes: int) -> None:
                nonlocal written
                written += num_bytes
                if written >= _UNSYNCED_BYTES:
                    os.fdatasync(descriptor)
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                    written = 0
                advance(num_bytes)

            for tensor, entry in zip(plan.tensors, layout.entries, strict=True):
                _write_tensor(descriptor, tensor, entry, count)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sha256 = sha256_of(temporary)
        os.rename(temporary, path)
        fsync_folder(folder)
    return FileRecord(plan.name, layout.file_bytes, sha256)


def write_durably(path: Path, content: bytes) -> None:
    """Replace a small file as a whole: sibling, fsync, rename."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with storage_errors(path, len(content)):
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensor(descriptor: int, plan: TensorPlan, entry: TensorEntry, advance: Callable[[int], None]) -> None:
    step = rows_per_block(entry.num_cols)
    for begin in range(0, entry.num_rows, step):
        end = min(begin + step, entry.num_rows)
        codes, scales = plan.tensor.encode(plan.first_row + begin, plan.first_row + end, entry.block_format)
        # `begin` is a multiple of 8, so the rows before it fill whole tiles.
        before = matrix_layout(entry.block_format, begin, entry.num_cols) if begin else None
        _pwrite_all(descriptor, _bytes_of(codes), entry.codes_offset + (before.codes_bytes if before else 0))
        if scales is not None:
            _pwrite_all(descriptor, _bytes_of(scales), entry.scales_offset + (before.scales_bytes if before else 0))
        advance(codes.nbytes + (0 if scales is None else scales.nbytes))


def _bytes_of(array: AnyArray) -> memoryview:
    flat: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return memoryview(flat)


def _pwrite_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
