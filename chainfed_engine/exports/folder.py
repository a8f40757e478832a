"""The folder or file of an export: made under another name, synced, renamed, so that it is never half-made.

Enters: the path that the user named. Leaves: a path beside it to write to, and in the end the one asked for.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chainfed_engine.errors import StorageError
from chainfed_engine.federation.files import fsync, storage_errors


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder; what is in it becomes `out`. Raises StorageError when `out` exists and is not empty."""
    partial = _sibling(out)
    with storage_errors(out, "write"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in sorted(partial.iterdir()):
                fsync(path)
            fsync(partial)
            if out.is_dir():
                out.rmdir()
            os.rename(partial, out)
            fsync(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """Yields the path of a file to write; it becomes `out`."""
    partial = _sibling(out)
    with storage_errors(out, "write"):
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            fsync(partial)
            os.rename(partial, out)
            fsync(out.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def check_free(out: Path) -> None:
    """Raises StorageError when `out` is there already (an empty folder counts as absent)."""
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise StorageError(f"{out}: exists already; name a new folder or file, or remove it")


def open_to_readers(folder: Path) -> None:
    """Give files the mode that the folder was made with: those of safetensors are for their owner alone."""
    for path in folder.iterdir():
        path.chmod(folder.stat().st_mode & 0o666)


def _sibling(out: Path) -> Path:
    check_free(out)
    absolute = Path(os.path.abspath(out))
    return absolute.with_name(f".{absolute.name}.partial")
