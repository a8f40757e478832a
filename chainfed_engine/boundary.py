"""The boundary cache: hidden states entering a layer, computed once per sample and kept on disk, packed and encoded.

One pair of files a depth: `depth-0004.bin` (records, one a token, appended) and `depth-0004.json` (the index, written
last through a sibling and a rename, so that it is the commit point). The index carries the key: a hash of everything
the records depend on. Another key, a missing or damaged file, a record whose checksum fails: all are a miss, never
an error and never used. Samples are kept in the groups they were computed in, because kernels sum in another order
for other shapes: advancing keeps the groups, so the result depends on the samples and the key alone. With a cipher
both files are encrypted, sample by sample, each piece bound to its place.
"""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chainfed_engine import native
from chainfed_engine.cache_cipher import CacheCipher
from chainfed_engine.errors import InvalidArgument, StorageError

MAX_INDEX_BYTES = 1 << 30


def cache_key(*parts: str) -> str:
    """sha256 over the parts, each with its length, so that no two lists of parts share a key."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Entry:
    """Where a sample's records lie."""

    first_token: int
    num_tokens: int
    checksum: int  # crc32 of its records; encrypted: the tag
    number: int = 0  # of the encrypted piece


class BoundaryCache:
    """Records of one depth under one key. `record_bytes` a token; `groups` are the sample ids as they were computed.

    Owns the open file; `close()` or use as a context manager. Unsealed appends are lost with the process (a miss).
    Make one with `open` (what is on disk under this key, or None) or `create` (empty; replaces what was there).
    """

    def __init__(
        self,
        directory: Path,
        depth: int,
        key: str,
        *,
        cache_format: str,
        hidden_size: int,
        cipher: CacheCipher | None = None,
    ) -> None:
        self._cipher = cipher
        self.depth, self.key, self.cache_format, self.hidden_size = depth, key, cache_format, hidden_size
        self.record_bytes = native.record_bytes(cache_format, hidden_size)
        self.groups: list[list[str]] = []
        self.entries: dict[str, Entry] = {}
        self.num_tokens = 0
        self._records, self._index = _paths(directory, depth)
        self._file: io.FileIO | None = None

    @classmethod
    def open(
        cls,
        directory: Path,
        depth: int,
        key: str,
        *,
        cache_format: str,
        hidden_size: int,
        cipher: CacheCipher | None = None,
    ) -> "BoundaryCache | None":
        """The sealed cache of this depth and key, or None: missing, other key, damaged."""
        cache = cls(directory, depth, key, cache_format=cache_format, hidden_size=hidden_size, cipher=cipher)
        if not cache._load():
            return None
        try:
            cache._file = io.FileIO(cache._records, "r+b")
        except OSError:
            return None
        return cache

    @classmethod
    def create(
        cls,
        directory: Path,
        depth: int,
        key: str,
        *,
        cache_format: str,
        hidden_size: int,
        cipher: CacheCipher | None = None,
    ) -> "BoundaryCache":
        """An empty cache, readable by its owner alone; StorageError when the directory cannot be written."""
        cache = cls(directory, depth, key, cache_format=cache_format, hidden_size=hidden_size, cipher=cipher)
        try:
            for folder in [*reversed(directory.parents), directory]:  # `parents` of mkdir would let others into them
                if not folder.exists():
                    folder.mkdir(exist_ok=True, mode=0o700)
            cache._index.unlink(missing_ok=True)
            descriptor = os.open(cache._records, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            cache._file = io.FileIO(descriptor, "r+b")
        except OSError as error:
            raise _storage_error(error, directory, 0) from error
        return cache

    def __enter__(self) -> "BoundaryCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self.entries

    def append(self, sample_ids: list[str], lengths: list[int], records: torch.Tensor) -> None:
        """Add one group: records u8 [sum(lengths), record_bytes], sample after sample."""
        view: Any = records.numpy()
        first, rows = self.num_tokens, 0
        try:
            self._open_file.seek(first * self.record_bytes)
            for sample_id, length in zip(sample_ids, lengths, strict=True):
                part = memoryview(view[rows : rows + length]).cast("B")
                if self._cipher is None:
                    self.entries[sample_id] = Entry(first + rows, length, zlib.crc32(part))
                else:
                    sealed, number, tag = self._cipher.encrypt(part, self._place(sample_id, first + rows))
                    self.entries[sample_id] = Entry(first + rows, length, tag, number)
                    _write_all(self._open_file, memoryview(sealed))
                rows += length
            if self._cipher is None:
                _write_all(self._open_file, memoryview(view).cast("B"))
        except OSError as error:
            raise _storage_error(error, self._records, view.nbytes) from error
        self.groups.append(list(sample_ids))
        self.num_tokens += rows

    def read(self, sample_ids: Iterable[str]) -> tuple[torch.Tensor, list[int]] | None:
        """Records u8 [tokens, record_bytes] and token counts of the samples in order; None when any is a miss."""
        wanted = [(sample_id, self.entries.get(sample_id)) for sample_id in sample_ids]
        found = [(sample_id, entry) for sample_id, entry in wanted if entry is not None]
        if len(found) != len(wanted):
            return None
        lengths = [entry.num_tokens for _, entry in found]
        records = torch.empty(sum(lengths), self.record_bytes, dtype=torch.uint8)
        array: Any = records.numpy()
        target, row = memoryview(array), 0
        for sample_id, entry in found:
            part = target[row : row + entry.num_tokens].cast("B")
            self._open_file.seek(entry.first_token * self.record_bytes)
            if self._open_file.readinto(part) != part.nbytes or not self._check(sample_id, entry, part):
                self._forget()
                return None
            row += entry.num_tokens
        return records, lengths

    def iterate_groups(self) -> Iterator[tuple[list[str], torch.Tensor, list[int]] | None]:
        """Every group as it was computed; None once when a record is damaged, and then the cache is empty."""
        for group in list(self.groups):
            found = self.read(group)
            if found is None:
                yield None
                return
            yield group, *found

    def seal(self) -> None:
        """Make what was appended last: records to disk first, then the index through a sibling and a rename."""
        index = {
            "key": self.key,
            "num_tokens": self.num_tokens,
            "record_bytes": self.record_bytes,
            "groups": self.groups,
            "entries": {name: [e.first_token, e.num_tokens, e.checksum, e.number] for name, e in self.entries.items()},
        }
        data = json.dumps(index).encode()
        if self._cipher is not None:
            sealed, number, tag = self._cipher.encrypt(data, self._place("index", 0))
            data = json.dumps({"number": number, "tag": tag}).encode() + b"\n" + sealed
        sibling = self._index.with_suffix(".json.tmp")
        try:
            os.fsync(self._open_file.fileno())
            with open(os.open(sibling, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(sibling, self._index)
        except OSError as error:
            raise _storage_error(error, self._index, len(data)) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _open_file(self) -> io.FileIO:
        if self._file is None:
            raise InvalidArgument(f"boundary cache {self._records}: used after close")
        return self._file

    def _place(self, name: str, first_token: int) -> str:
        return f"{self.key}/{self.depth}/{first_token}/{name}"

    def _check(self, sample_id: str, entry: Entry, part: memoryview) -> bool:
        """Whether records are what was written; decrypts them in place."""
        if self._cipher is None:
            return zlib.crc32(part) == entry.checksum
        place = self._place(sample_id, entry.first_token)
        plain = self._cipher.decrypt(part, entry.number, entry.checksum, place)
        if plain is not None:
            part[:] = plain
        return plain is not None

    def _opened(self, data: bytes) -> bytes:
        """The index as JSON. Raises ValueError for one that is encrypted under another key."""
        if self._cipher is None:
            return data
        first, _, sealed = data.partition(b"\n")
        seal = json.loads(first)
        plain = self._cipher.decrypt(sealed, int(seal["number"]), int(seal["tag"]), self._place("index", 0))
        if plain is None:
            raise ValueError("the index does not open")
        return plain

    def _forget(self) -> None:
        self.entries.clear()
        self.groups.clear()
        self.num_tokens = 0

    def _load(self) -> bool:
        try:
            if self._index.stat().st_size > MAX_INDEX_BYTES:
                return False
            index = json.loads(self._opened(self._index.read_bytes()))
            if index["key"] != self.key or index["record_bytes"] != self.record_bytes:
                return False
            num_tokens = int(index["num_tokens"])
            if num_tokens < 0 or self._records.stat().st_size < num_tokens * self.record_bytes:
                return False
            entries = {str(name): Entry(*map(int, entry)) for name, entry in index["entries"].items()}
            groups = [[str(name) for name in group] for group in index["groups"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        inside = all(e.first_token >= 0 and 0 < e.num_tokens <= num_tokens - e.first_token for e in entries.values())
        if not inside or any(name not in entries for group in groups for name in group):
            return False
        self.entries, self.groups, self.num_tokens = entries, groups, num_tokens
        return True


def wipe(directory: Path, *, keep: Iterable[int] = ()) -> None:
    """Remove the caches of all depths but `keep`."""
    kept = {path for depth in keep for path in _paths(directory, depth)}
    for path in directory.glob("depth-*"):
        if path not in kept:
            path.unlink(missing_ok=True)


def _paths(directory: Path, depth: int) -> tuple[Path, Path]:
    return directory / f"depth-{depth:04d}.bin", directory / f"depth-{depth:04d}.json"


def _write_all(file: io.FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _storage_error(error: OSError, path: Path, needed: int) -> StorageError:
    free = ""
    try:
        stat = os.statvfs(path if path.is_dir() else path.parent)
        free = f", {stat.f_bavail * stat.f_frsize} bytes free"
    except OSError:
        pass
    return StorageError(
        f"boundary cache {path}: {error.strerror} (writing {needed} bytes{free}); "
        "free space or move the cache directory"
    )
