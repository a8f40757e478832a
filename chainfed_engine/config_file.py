"""CONFIG.toml: read with overrides, checked, written. In: text; out: a `RunConfig`, equal after a round trip.

Tables and keys are those of the fields' metadata in `config`; a mistake is one `ConfigError` that names file, table,
key and, for an unknown key, the nearest known one.
"""

import dataclasses
import json
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chainfed_engine.config import ChainConfig, DataConfig, RunConfig, alternatives, checked, nearest_word
from chainfed_engine.errors import ConfigError

_PATHS = {("model", "store"), ("data", "train"), ("data", "eval")}
_CLASSES: tuple[type[ChainConfig] | type[DataConfig], ...] = (ChainConfig, DataConfig)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, which an editor may have begun with a byte order mark. Raises ConfigError that names
    the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}; name an existing TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read CONFIG.toml; `overrides` are `table.key=value` texts that replace or add keys.

    Paths in the file are relative to its folder, paths in overrides to the working directory. Raises ConfigError,
    naming file, table, key and, for an unknown key, the nearest known one.
    """
    path = Path(path)
    document = read_toml(path)
    try:
        values = _flatten(document, path.parent.absolute())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for override in overrides:
        try:
            values |= _override(override)
        except ConfigError as error:
            raise ConfigError(f"--set {override}: {error}") from None
    try:
        return _build(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def build_config(document: Mapping[str, Any], folder: Path) -> RunConfig:
    """A run from the tables of a TOML document; paths are relative to `folder`. Raises ConfigError."""
    return _build(_flatten(document, folder))


def dump_config(config: RunConfig) -> str:
    """TOML text that `load_config` reads back as an equal RunConfig; None is written as its word ("auto", "none")."""
    tables: dict[str, dict[str, Any]] = {"model": {"store": config.store}, "data": {}, "chain": {}}
    for record in (config.chain, config.data):
        for item in dataclasses.fields(record):
            value = getattr(record, item.name)
            value = item.metadata["none"] if value is None else value
            tables.setdefault(item.metadata["table"], {})[item.name] = value
    blocks = []
    for table, keys in tables.items():
        lines = [f"[{table}]", *(f"{key} = {_toml_value(value)}" for key, value in keys.items())]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _known() -> dict[tuple[str, str], tuple[Any, Mapping[str, Any]]]:
    """(table, key) -> (type hint, metadata) of every key a file may have."""
    known: dict[tuple[str, str], tuple[Any, Mapping[str, Any]]] = {}
    for record in _CLASSES:
        hints = typing.get_type_hints(record)
        for item in dataclasses.fields(record):
            known[item.metadata["table"], item.name] = (hints[item.name], item.metadata)
    known["model", "store"] = (str, {"none": None, "size": False})
    return known


def _flatten(document: Mapping[str, Any], folder: Path) -> dict[tuple[str, str], Any]:
    values: dict[tuple[str, str], Any] = {}
    for table, keys in document.items():
        if not isinstance(keys, dict):
            raise ConfigError(f"{table}: expected a table [{table}], got a value outside any table")
        for key, value in keys.items():
            values[table, key] = _known_value(table, key, value, folder)
    return values


def _override(text: str) -> dict[tuple[str, str], Any]:
    """`table.key=value`. The value is read as TOML unless the field is text or it is no TOML."""
    name, equals, value = text.partition("=")
    table, dot, key = name.strip().partition(".")
    if not equals or not dot:
        raise ConfigError("expected table.key=value, for example train.lr=0.001")
    hint = _known().get((table, key), (str, {}))[0]
    parsed: Any = value
    if str not in alternatives(hint):
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value
    return {(table, key): _known_value(table, key, parsed, Path.cwd())}


def _known_value(table: str, key: str, value: Any, folder: Path) -> Any:
    """The value checked against the key's type and range, paths made absolute. ConfigError for an unknown key."""
    known = _known()
    if table not in {name for name, _ in known}:
        raise ConfigError(f"[{table}]: unknown table{nearest_word(table, sorted({name for name, _ in known}))}")
    if (table, key) not in known:
        nearest = nearest_word(key, [name for owner, name in known if owner == table])
        elsewhere = [owner for owner, name in known if name == key]
        nearest = f"; {key} belongs in [{elsewhere[0]}]" if elsewhere else nearest
        raise ConfigError(f"[{table}] {key}: unknown key{nearest}")
    hint, metadata = known[table, key]
    value = checked(f"[{table}] {key}", hint, metadata, value)
    return str(folder / value) if (table, key) in _PATHS and value else value


def _build(values: dict[tuple[str, str], Any]) -> RunConfig:
    if not values.get(("model", "store")):
        raise ConfigError("[model] store: expected the path of a layer store (see `chainfed convert`), got none")
    records: list[Any] = []
    for record in _CLASSES:
        names = {(item.metadata["table"], item.name) for item in dataclasses.fields(record)}
        records.append(record(**{key: value for (table, key), value in values.items() if (table, key) in names}))
    return RunConfig(chain=records[0], data=records[1], store=values["model", "store"])


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
