"""Replies of the exchange under way, kept on disk as they come, so that a crash of the server loses none of them.

In: the exchange's tasks, replies. Out: what was received before the crash, and the tasks that are still to be done.
One file a reply, bound to its exchange by a hash of all tasks; a file that is damaged or of another exchange does not
count, and its client is asked again. Files are not fsynced: after a power cut the checksum tells, and to ask again is
all that is lost. Error replies are not kept: a client that could not answer may be able to after the crash.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from chainfed_engine.errors import CorruptFile
from chainfed_engine.federation import files
from chainfed_engine.federation.messages import reply_from, reply_record, task_record
from chainfed_engine.types import Reply, Task

_NAME = re.compile(r"reply-(\d{6})\.safetensors")


class Journal:
    """Of one exchange, in the folder `path`; files there that belong to another exchange are removed."""

    def __init__(self, path: Path, tasks: Sequence[Task]) -> None:
        self._path = path
        self._exchange = exchange_digest(tasks)
        asked = {(task.client, task.kind, task.round_id) for task in tasks}
        self.answered: set[str] = set()
        self._kept: list[Path] = []
        self._number = 0
        for file in _files(path):
            reply = self._reply(file)
            if reply is None:
                files.remove(file)
                continue
            if (reply.client, reply.kind, reply.round_id) in asked:  # others are late, or strangers'
                self.answered.add(reply.client)
            self._kept.append(file)
            self._number = _number(file) + 1
        self.missing = [task for task in tasks if task.client not in self.answered]

    def received(self) -> Iterator[Reply]:
        """Replies of before the crash in the order in which they came, read one at a time."""
        for file in self._kept:
            arrays, record, _ = files.read_arrays(file)
            yield reply_from(record["reply"], arrays)

    def keep(self, replies: Iterable[Reply]) -> Iterator[Reply]:
        """Pass replies on, each once it is on disk. What cannot be written (values that no honest client sends) is
        passed on for the server to refuse."""
        for reply in replies:
            if reply.error is None:
                self._write(reply)
            yield reply

    @staticmethod
    def clear(path: Path) -> None:
        """The exchange is over and its outcome saved."""
        for file in _files(path):
            files.remove(file)

    def _write(self, reply: Reply) -> None:
        try:
            record = {"exchange": self._exchange, "reply": reply_record(reply)}
            arrays = {str(key): _plain(array) for key, array in reply.arrays.items()}
            json.dumps(record, allow_nan=False)
        except (TypeError, ValueError, AttributeError):
            return
        name = f"reply-{self._number:06d}.safetensors"
        files.write_arrays(self._path / name, arrays, record, durable=False)
        self._number += 1

    def _reply(self, file: Path) -> Reply | None:
        """What was received in this exchange, if it is whole."""
        try:
            arrays, record, _ = files.read_arrays(file)
            if record.get("exchange") != self._exchange:
                return None
            return reply_from(record.get("reply"), arrays)
        except CorruptFile:
            return None


def exchange_digest(tasks: Sequence[Task]) -> str:
    """SHA-256 over everything the tasks ask for; which arrays travel with them (a matter of who holds what) is left
    out, for their versions stand in it."""
    content = json.dumps([task_record(task) for task in tasks], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _plain(array: object) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.dtype.str[0] == ">":
        raise TypeError("expected an array of numbers")
    return np.ascontiguousarray(array)


def _files(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if _NAME.fullmatch(entry.name))


def _number(file: Path) -> int:
    match = _NAME.fullmatch(file.name)
    assert match is not None
    return int(match[1])
