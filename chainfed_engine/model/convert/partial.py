"""`<destination>.partial`: where a store is made, so that a half-made one never looks finished and is resumed.

`conversion.json` in it says of which source with which settings (`key`) the folder is, and lists the finished files. A
file listed there whose sha256 still matches is kept; a folder with another key starts over. One process at a time: the
folder is locked. Publishing writes store.json last and renames the folder to its destination.
"""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from types import TracebackType

from chainfed_engine.errors import CorruptFile, StorageError
from chainfed_engine.model.convert.plan import FilePlan
from chainfed_engine.model.convert.writer import (
    FileRecord,
    Progress,
    disk_full,
    fsync_folder,
    plan_layout,
    storage_errors,
    write_durably,
    write_store_file,
)
from chainfed_engine.model.format import STORE_JSON, TOKENIZER_FOLDER, StoreInfo, sha256_of
from chainfed_engine.model.header import parse_json

JOURNAL = "conversion.json"
_OUR_FILES = re.compile(r"((embedding|(layer|head)-\d{4,10})\.safetensors|store\.json|conversion\.json)(\.tmp)?")
_SPARE_BYTES = 64_000_000  # tokenizer, store.json, the file system's own needs


def read_journal(folder: Path) -> dict[str, object]:
    """The journal in `folder`, empty when there is none or it cannot be used (then nothing is resumed)."""
    try:
        content = parse_json((folder / JOURNAL).read_bytes(), JOURNAL)
    except (OSError, CorruptFile):
        return {}
    return content if isinstance(content, dict) else {}


def is_already_made(destination: Path, key: str) -> bool:
    """Whether `destination` is a store of exactly this source and these settings. StorageError when it is something
    else; an empty folder counts as absent."""
    if not os.path.lexists(destination):
        return False
    with storage_errors(destination, 0):
        if destination.is_dir() and not any(destination.iterdir()):
            return False
    if read_journal(destination).get("key") == key:
        StoreInfo.read(destination)
        return True
    raise StorageError(
        f"{destination}: exists and is not a store of this source with these settings; name another folder"
    )


class PartialStore:
    """A context: locks the folder on entry, unlocks on exit; what is finished stays for the next attempt."""

    def __init__(self, destination: Path, key: str):
        self._destination, self._key = destination, key
        self.path = destination.with_name(destination.name + ".partial")
        self._finished: dict[str, FileRecord] = {}
        self._lock = -1

    def __enter__(self) -> "PartialStore":
        with storage_errors(self.path, 0):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StorageError(f"{self.path}: another conversion is writing here; wait for it") from error
            with storage_errors(self.path, 0):
                self._resume()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def write_files(self, plans: tuple[FilePlan, ...], progress: Progress | None) -> list[FileRecord]:
        """All files of the store, in order; those finished before are kept. StorageError when they will not fit."""
        sizes = {plan.name: plan_layout(plan).file_bytes for plan in plans}
        missing = sum(size for name, size in sizes.items() if name not in self._finished)
        if shutil.disk_usage(self.path).free < missing + _SPARE_BYTES:
            raise disk_full(self.path, missing + _SPARE_BYTES)
        done, total = 0, sum(sizes.values())
        for plan in plans:
            end = done + sizes[plan.name]

            def advance(num_bytes: int, name: str = plan.name) -> None:
                nonlocal done
                done += num_bytes
                if progress is not None:
                    progress(name, done, total)

            if plan.name not in self._finished:
                self._finished[plan.name] = write_store_file(self.path, plan, advance)
                self._write_journal()
            done = end
            advance(0)
        return [self._finished[plan.name] for plan in plans]

    def fresh_tokenizer_folder(self) -> Path:
        folder = self.path / TOKENIZER_FOLDER
        with storage_errors(folder, _SPARE_BYTES):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        return folder

    def publish(self, store_json: bytes) -> None:
        """Write store.json, then give the folder its name."""
        write_durably(self.path / STORE_JSON, store_json)
        with storage_errors(self._destination, 0):
            os.rename(self.path, self._destination)
            fsync_folder(self._destination.parent)

    def _resume(self) -> None:
        """Keep the finished files of the same key whose checksum matches; remove everything else that is ours."""
        foreign = [item.name for item in self.path.iterdir() if not self._is_ours(item)]
        if foreign:
            raise StorageError(f"{self.path}: holds {foreign[0]!r}, which no conversion wrote; move the folder away")
        journal = read_journal(self.path)
        files = journal.get("files") if journal.get("key") == self._key else None
        for name, entry in files.items() if isinstance(files, dict) else ():
            if _OUR_FILES.fullmatch(name) and isinstance(entry, dict) and (self.path / name).is_file():
                sha256 = sha256_of(self.path / name)
                if sha256 == entry.get("sha256"):
                    self._finished[name] = FileRecord(name, (self.path / name).stat().st_size, sha256)
        for item in self.path.iterdir():
            if item.name not in self._finished and item.name != TOKENIZER_FOLDER:
                item.unlink()
        self._write_journal()

    @staticmethod
    def _is_ours(item: Path) -> bool:
        return item.name == TOKENIZER_FOLDER or (_OUR_FILES.fullmatch(item.name) is not None and not item.is_dir())

    def _write_journal(self) -> None:
        files = {
            record.name: {"bytes": record.file_bytes, "sha256": record.sha256} for record in self._finished.values()
        }
        content = {"key": self._key, "files": files}
        write_durably(self.path / JOURNAL, json.dumps(content, indent=1).encode())
