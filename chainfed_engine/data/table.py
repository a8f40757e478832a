"""Tables of examples: from a CSV, TSV, JSONL or Parquet file (the text formats also as .gz, .bz2 or .xz), or from
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

from chainfed_engine.data import files
from chainfed_engine.errors import DataError


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
        if name not in self.columns:
            raise DataError(f"{self.source}: no column {name!r}; there are {', '.join(map(repr, self.columns))}")
        return self.columns[name]

    def texts(self, name: str) -> list[str]:
        """A column in which every value must be text that is not blank."""
        values = self.column(name)
        for row, value in enumerate(values):
            if not isinstance(value, str):
                kind = "nothing" if value is None else type(value).__name__
                raise DataError(f"{self.where(row)}: column {name!r}: expected text, got {kind}")
            if not value.strip():
                raise DataError(f"{self.where(row)}: column {name!r} is blank; drop such rows")
        return values

    def names(self, name: str) -> list[str]:
        """A column of labels or client names: text, whole numbers or booleans, all as text."""
        result = []
        for row, value in enumerate(self.column(name)):
            if isinstance(value, bool | np.bool_):
                value = str(bool(value)).lower()
            elif isinstance(value, int | np.integer):
                value = str(int(value))
            if not isinstance(value, str) or not value.strip():
                got = "a blank" if isinstance(value, str) else "nothing" if value is None else type(value).__name__
                raise DataError(
                    f"{self.where(row)}: column {name!r}: expected a name (text or a whole number), got {got}"
                )
            result.append(value)
        return result

    def select(self, rows: Sequence[int] | np.ndarray[Any, Any]) -> "Table":
        """A table of the given rows, in that order."""
        lines = array("q", (self.line_numbers[row] for row in rows)) if self.line_numbers else array("q")
        return Table(self.source, {name: [col[row] for row in rows] for name, col in self.columns.items()}, lines)


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> Table:
    """Read a file; `columns`: the only ones to keep (each must exist), None: all.

    Recognised by the ending: .csv .tsv .jsonl (each also with .gz .bz2 .xz) and .parquet.
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
    names = getattr(examples, "column_names", None)  # datasets.Dataset
    if isinstance(names, list):
        return Table(source, {name: list(examples[name]) for name in _wanted(source, names, columns)})
    if hasattr(examples, "iloc") and hasattr(examples, "columns"):  # pandas.DataFrame
        names = [str(name) for name in examples.columns]
        return Table(source, {name: examples[name].tolist() for name in _wanted(source, names, columns)})
    if isinstance(examples, Iterable) and not isinstance(examples, bytes | dict):
        return _collect(source, ((None, row) for row in examples), columns)
    raise DataError(
        f"{source}: expected a path, a list of dicts, a data frame or a datasets.Dataset, got {type(examples).__name__}"
    )


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
            for name in row.keys() - kept.keys():
                kept[str(name)] = [None] * count
        elif missing := next((name for name in columns if name not in row), None):
            place = f"line {line}" if line is not None else f"row {count}"
            there = ", ".join(map(repr, islice(row, 32)))
            raise DataError(f"{source}, {place}: no column {missing!r}; there are {there}")
        for name, values in kept.items():
            values.append(row.get(name))
        count += 1
    if not count:
        raise DataError(f"{source}: expected at least one row, got none")
    return Table(source, kept, lines)


def _wanted(source: str, there: Sequence[str], columns: Sequence[str] | None) -> Sequence[str]:
    missing = next((name for name in columns or () if name not in there), None)
    if missing is not None:
        raise DataError(f"{source}: no column {missing!r}; there are {', '.join(map(repr, there))}")
    return columns if columns is not None else there
