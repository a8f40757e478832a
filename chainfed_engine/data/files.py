"""Rows of a data file, one at a time: `open_rows(path, columns)` yields (line number, {column: value}).

CSV and TSV values are text; JSON and Parquet values are what the file says. Bytes are not trusted: encoding, quoting,
ragged rows, duplicate columns, bad JSON and truncated archives raise DataError with the line number.
"""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from chainfed_engine.errors import DataError

OTHER_SEPARATOR = (
    "the file seems to separate its columns by another character: save it with commas, or as .tsv with tabs"
)
Row = tuple[int | None, dict[str, Any]]
Reader = Callable[[Path, IO[str]], Iterator[Row]]

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_MAX_CELL_CHARS = 1 << 24  # one CSV cell; the csv module's own limit of 128 Ki is less than a long document
_PIECE_CHARS = 1 << 16  # of a JSON list, read at a time; more for a row that is longer
_JSON_REMEDY = "write one object a line, or one list of objects"
_BLANKS = re.compile(r"\s*")
_KNOWN = "expected .csv, .tsv, .jsonl or .json (also with .gz, .bz2 or .xz) or .parquet; save it as one of these"


def open_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    """Rows of `path` by its ending. `columns` lets Parquet read less; other formats yield every column."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name the data file in it")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".parquet"]:
        return _parquet_rows(path, columns)
    opener: Callable[..., Any] = open
    if suffixes and suffixes[-1] in _OPENERS:
        opener = _OPENERS[suffixes.pop()]
    reader = _READERS.get(suffixes[-1] if suffixes else "")
    if reader is None:
        raise DataError(f"{path}: unknown kind of data file; {_KNOWN}")
    return _text_rows(path, opener, reader)


def _text_rows(
    path: Path, opener: Callable[..., Any], reader: Callable[[Path, IO[str]], Iterator[Row]]
) -> Iterator[Row]:
    line = 0
    try:
        # newline="" leaves line ends inside quoted CSV cells as they are.
        with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
            for number, row in reader(path, stream):
                line = number or line
                yield number, row
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path, opener)) from error
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}, after line {line}: the compressed file is damaged: {error}") from error
    except OSError as error:
        raise DataError(f"{path}, after line {line}: cannot be read: {error.strerror or error}") from error


def _not_utf8(path: Path, opener: Callable[..., Any]) -> str:
    """The message for a file that does not decode, with the line: text is decoded in pieces, ahead of the lines."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with opener(path, "rb") as stream:
        while piece := stream.read(_PIECE_CHARS):
            if line == 1 and piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return f"{path}: UTF-16 text; save it as UTF-8"
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                byte = error.object[error.start]
                return f"{path}, line {line}: not UTF-8 text (byte 0x{byte:02x}); save it as UTF-8"
            line += piece.count(b"\n")
    return f"{path}, line {line}: ends in the middle of a UTF-8 character; the file was cut off: copy it again"


def _tsv_rows(path: Path, stream: IO[str]) -> Iterator[Row]:
    return _csv_rows(path, stream, delimiter="\t")


def _csv_rows(path: Path, stream: IO[str], delimiter: str = ",") -> Iterator[Row]:
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    start = 1  # a quoted cell may span lines: a row starts one after the last line of the row before it
    while True:
        previous_limit = csv.field_size_limit(_MAX_CELL_CHARS)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {start}: not a CSV row: {error}{_separator_hint(names, delimiter)}"
            ) from error
        finally:
            csv.field_size_limit(previous_limit)
        line, start = start, reader.line_num + 1
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if names is None:
            names = cells
            if len(set(names)) != len(names):
                raise DataError(f"{path}, line {line}: a column name stands twice in {', '.join(map(repr, names))}")
            continue
        if len(cells) != len(names):
            hint = _separator_hint(names, delimiter)
            raise DataError(f"{path}, line {line}: expected {len(names)} values, got {len(cells)}{hint}")
        yield line, dict(zip(names, cells, strict=True))


def _separator_hint(names: list[str] | None, delimiter: str) -> str:
    if names and looks_otherwise_separated(names):
        return f"; {OTHER_SEPARATOR}"
    mark = "comma" if delimiter == "," else "tab"
    return f'; values are separated by {mark}s, and one that holds a {mark}, a quote or a line break stands in "quotes"'


def looks_otherwise_separated(names: Sequence[str]) -> bool:
    """Whether a header of one name seems to hold several."""
    return len(names) == 1 and any(mark in names[0] for mark in ";|\t")


def _json_rows(path: Path, stream: IO[str]) -> Iterator[Row]:
    """An object a line, or one list of objects."""
    seen = False
    for line, text in enumerate(stream, start=1):
        if not text.strip():
            continue
        if not seen and text.lstrip().startswith("["):
            stream.seek(0)
            yield from _list_rows(path, stream)
            return
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: not JSON: {error}; {_JSON_REMEDY}") from error
        seen = True
        yield line, row


def _list_rows(path: Path, stream: IO[str]) -> Iterator[Row]:
    """The rows of a JSON list, of which only a piece is in memory."""
    decoder = json.JSONDecoder()
    text, at, line, piece, expected = "", 0, 1, _PIECE_CHARS, "["
    while True:
        mark_at = _end_of_blanks(text, at)
        row_at = _end_of_blanks(text, mark_at + 1)
        mark = text[mark_at : mark_at + 1]
        if (mark + text[row_at : row_at + 1] if expected == "[" else mark) in ("[]", "]"):
            end = row_at + 1 if expected == "[" else mark_at + 1
            line += text.count("\n", at, end)
            _check_nothing_follows(path, line, text[end:], stream)
            return
        try:
            if mark and mark != expected:
                raise ValueError(f"expected {expected!r} or the end of the list, got {mark!r}")
            row, end = decoder.raw_decode(text, row_at)
        except (ValueError, RecursionError) as error:
            more = stream.read(piece) if len(text) - at < _MAX_CELL_CHARS else ""
            if not more:
                line += text.count("\n", at, row_at)
                raise DataError(f"{path}, line {line}: not JSON: {_reason(error)}; {_JSON_REMEDY}") from error
            text, at, piece = text[at:] + more, 0, 2 * piece
            continue
        line += text.count("\n", at, row_at)
        yield line, row
        line += text.count("\n", row_at, end)
        at, piece, expected = end, _PIECE_CHARS, ","


def _reason(error: Exception) -> str:
    """Without the decoder's position, which is that in a piece."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _check_nothing_follows(path: Path, line: int, text: str, stream: IO[str]) -> None:
    while True:
        if rest := text.lstrip():
            line += text.count("\n", 0, len(text) - len(rest))
            raise DataError(f"{path}, line {line}: expected the end of the file after the list's ']', got {rest[0]!r}")
        line += text.count("\n")
        text = stream.read(_PIECE_CHARS)
        if not text:
            return


def _end_of_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return found.end() if found is not None else at


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow; pip install 'chainfed-engine[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            missing = next((name for name in columns or () if name not in there), None)
            if missing is not None:
                raise DataError(f"{path}: no column {missing!r}; there are {', '.join(map(repr, there))}")
            for batch in file.iter_batches(batch_size=1024, columns=list(columns) if columns is not None else None):
                for row in batch.to_pylist():
                    yield None, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {str(error).splitlines()[0]}") from error


_READERS: dict[str, Reader] = {
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
}
