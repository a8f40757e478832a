"""Progress of conversions on stderr: a bar of bytes on a terminal, a plain line each tenth otherwise.

Runs show theirs through `chainfed_engine.callbacks.Progress`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from chainfed_engine.sizes import format_size


@contextmanager
def byte_progress(name: str, stream: IO[str] | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done_bytes, total_bytes) that draws a bar of bytes, or prints each tenth without a terminal."""
    stream = stream if stream is not None else sys.stderr
    if not stream.isatty():
        yield _PlainBytes(name, stream)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda what, done, total: bar.update(task, completed=done, total=total, description=f"{name} {what}")


class _PlainBytes:
    def __init__(self, name: str, stream: IO[str]) -> None:
        self._name, self._stream, self._tenths = name, stream, -1

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None:
        tenths = 10 * done_bytes // max(1, total_bytes)
        if tenths > self._tenths:
            self._tenths = tenths
            sizes = f"{format_size(done_bytes)} of {format_size(total_bytes)}"
            print(f"{self._name} {10 * tenths}%  {sizes}  {what}", file=self._stream, flush=True)
