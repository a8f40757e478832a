"""Tables of examples: from a CSV, TSV, JSON, JSONL or Parquet file (the text formats also as .gz, .bz2 or .xz), or from
Python records, data frames and `datasets.Dataset` objects, which are recognised by their methods, never imported.

A file is read row by row and only the columns asked for are kept. Everything that does not hold raises DataError with
the file and the row's line number.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from chainfed_engine.config import joined_columns
from chainfed_engine.data import files
from chainfed_engine.errors import DataError

_DROP = '; drop such rows, or set [data] missing = "drop"'


@dataclass(frozen=True)
class Table:
    """Columns of equal length. `line_numbers`: line of the source on which each row starts, empty if it has none."""

    source: str
    columns: dict[str, list[Any]]
    line_numbers: "array[int]" = field(default_factory=lambda: array("q"))

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{self.source}: expected columns of one length, got {lengths}")
        if not len(self):
            raise DataError(f"{self.source}: expected at least one row, got none")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def where(self, row: int) -> str:
        """The place of a row for an error message."""
        return f"{self.source}, line {self.line_numbers[row]}" if self.line_numbers else f"{self.source}, row {row}"

    def column(self, name: str) -> list[Any]:
        """A column by its name; "a + b": the texts of both that are not blank, a line each, None where both are."""
        parts = joined_columns(name)
        if name not in self.columns and len(parts) > 1:
            return [_joined(values) for values in zip(*map(self.column, parts), strict=True)]
        if name not in self.columns:
            raise _no_column(self.source, name, self.columns)
        return self.columns[name]

    def texts(self, name: str) -> list[str]:
        """A column in which every value must be text that is not blank."""
        values = self.column(name)
        for row, value in enumerate(values):
            if not isinstance(value, str):
                remedy = _DROP if value is None else ""
                raise DataError(f"{self.where(row)}: column {name!r}: expected text, got {_described(value)}{remedy}")
            if not value.strip():
                raise DataError(f"{self.where(row)}: column {name!r} is blank{_DROP}")
        return values

    def names(self, name: str) -> list[str]:
        """A column of labels or client names: text, whole numbers or booleans, all as text."""
        result = []
        for row, value in enumerate(self.column(name)):
            if isinstance(value, bool | np.bool_):
                value = str(bool(value)).lower()
            elif isinstance(value, int | np.integer) or (isinstance(value, float) and value.is_integer()):
                value = str(int(value))  # data frames turn whole numbers beside missing ones into floats
            if not isinstance(value, str) or not value.strip():
                remedy = _DROP if _is_blank(value) else "; turn the column into text"
                raise DataError(
                    f"{self.where(row)}: column {name!r}: expected a name (text or a whole number), got "
                    f"{_described(value)}{remedy}"
                )
            result.append(value)
        return result

    def conversations(self, name: str) -> list[list[dict[str, str]]]:
        """A column of lists of {"role", "content"}, both text, that does not begin with the assistant."""
        result = []
        for row, value in enumerate(self.column(name)):
            turns = list(value) if isinstance(value, list | tuple | np.ndarray) else []
            if not turns or not all(isinstance(turn, dict) and _is_turn(turn) for turn in turns):
                raise DataError(
                    f'{self.where(row)}: column {name!r}: expected a list of {{"role": text, "content": text}}, got '
                    f"{_described(value)}"
                )
            if turns[0]["role"] == "assistant":
                raise DataError(f"{self.where(row)}: column {name!r}: expected a conversation that the user begins")
            result.append([{"role": turn["role"], "content": turn["content"]} for turn in turns])
        return result

    def without_blanks(self, names: Sequence[str]) -> "Table":
        """The rows in which none of the columns is missing or blank. Raises DataError when none is left."""
        columns = [self.column(name) for name in names]
        kept = [row for row in range(len(self)) if not any(_is_blank(column[row]) for column in columns)]
        if not kept:
            raise DataError(f"{self.source}: every row lacks a value in one of {', '.join(map(repr, names))}")
        return self if len(kept) == len(self) else self.select(kept)

    def select(self, rows: Sequence[int] | np.ndarray[Any, Any]) -> "Table":
        """A table of the given rows, in that order."""
        lines = array("q", (self.line_numbers[row] for row in rows)) if self.line_numbers else array("q")
        return Table(self.source, {name: [col[row] for row in rows] for name, col in self.columns.items()}, lines)


def _joined(values: Sequence[Any]) -> Any:
    """The values that are not blank, as lines of one text; one that is no text is left for the caller to refuse."""
    given = [value for value in values if not _is_blank(value)]
    strange = next((value for value in given if not isinstance(value, str)), None)
    return strange if strange is not None else "\n".join(given) or None


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> Table:
    """Read a file; `columns`: the only ones to keep (each must exist), None: all.

    Recognised by the ending: .csv .tsv .jsonl .json (each also with .gz .bz2 .xz) and .parquet.
    """
    rows = files.open_rows(Path(path), columns)
    return _collect(str(path), rows, columns)


def as_table(examples: Any, source: str = "examples", columns: Sequence[str] | None = None) -> Table:
    """A Table from a Table, a path, a list of dicts, a pandas DataFrame or a datasets.Dataset."""
    if isinstance(examples, Table):
        _wanted(examples.source, list(examples.columns), columns)
        return examples
    if isinstance(examples, str | Path):
        return read_table(examples, columns)
    names = getattr(examples, "column_names", None)
    if isinstance(names, dict):  # datasets.DatasetDict
        raise DataError(f"{source}: expected one split of the data set; there are {', '.join(map(repr, names))}")
    if isinstance(names, list):  # datasets.Dataset
        return Table(source, {name: _dataset_column(examples, name) for name in _wanted(source, names, columns)})
    if hasattr(examples, "iloc") and hasattr(examples, "columns"):  # pandas.DataFrame
        names = [str(name) for name in examples.columns]
        if len(set(names)) < len(names):
            raise DataError(f"{source}: a column name stands twice in {', '.join(map(repr, names))}; rename one")
        wanted = _wanted(source, names, columns)
        return Table(source, {name: _series_values(examples.iloc[:, names.index(name)]) for name in wanted})
    if isinstance(examples, Iterable) and not isinstance(examples, bytes | dict):
        return _collect(source, ((None, row) for row in examples), columns)
    raise DataError(
        f"{source}: expected a path, a list of dicts, a data frame or a datasets.Dataset, got {type(examples).__name__}"
    )


def _dataset_column(dataset: Any, name: str) -> list[Any]:
    """A column of a datasets.Dataset as Python values; a ClassLabel's numbers become its names."""
    plain = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    values = list(plain[name])
    class_names = getattr((getattr(dataset, "features", None) or {}).get(name), "names", None)
    if not isinstance(class_names, list):
        return values
    return [
        class_names[value] if isinstance(value, int) and 0 <= value < len(class_names) else None for value in values
    ]


def _series_values(series: Any) -> list[Any]:
    """A column of a data frame; NaN, NaT and NA become None."""
    there = series.notna().tolist()
    return [value if known else None for value, known in zip(series.tolist(), there, strict=True)]


def _collect(source: str, rows: Iterable[tuple[int | None, Any]], columns: Sequence[str] | None) -> Table:
    """Transpose (line, row) pairs into columns. Without `columns` the union of all rows' keys; gaps are None."""
    kept: dict[str, list[Any]] = {name: [] for name in columns or ()}
    lines, count = array("q"), 0
    for line, row in rows:
        if not isinstance(row, dict):
            place = f"line {line}" if line is not None else f"row {count}"
            raise DataError(
                f"{source}, {place}: expected an object of column names and values, got {type(row).__name__}"
            )
        if line is not None:
            lines.append(line)
        if columns is None:
            for name in row:
                kept.setdefault(str(name), [None] * count)
        elif missing := next((name for name in columns if name not in row), None):
            place = f", line {line}" if line is not None else f", row {count}"
            raise _no_column(source + place if count else source, missing, list(islice(row, 32)))
        for name, values in kept.items():
            values.append(row.get(name))
        count += 1
    if not count:
        raise DataError(f"{source}: expected at least one row, got none")
    return Table(source, kept, lines)


def _wanted(source: str, there: Sequence[str], columns: Sequence[str] | None) -> Sequence[str]:
    missing = next((name for name in columns or () if name not in there), None)
    if missing is not None:
        raise _no_column(source, missing, there)
    return columns if columns is not None else there


def _is_blank(value: Any) -> bool:
    return (
        value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and value != value)
    )


def _is_turn(turn: dict[Any, Any]) -> bool:
    return isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def _described(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return "nothing"
    return "a blank" if _is_blank(value) else type(value).__name__


def _no_column(where: str, name: str, there: Iterable[str]) -> DataError:
    there = list(there)
    hint = "name the right one in [data] (text, label, prompt, response, messages, client)"
    if files.looks_otherwise_separated(there):
        hint = files.OTHER_SEPARATOR
    return DataError(f"{where}: no column {name!r}; there are {', '.join(map(repr, there))}; {hint}")
