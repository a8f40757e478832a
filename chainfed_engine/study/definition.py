"""STUDY.toml: what is to be run. In: the file; out: a `Study` with every run's whole configuration, checked.

    [study]           methods, seeds, reference, threads, clock
    [run.TABLE]       settings of every run, as in a run's own file
    [data.NAME]       keys of [data]; [data.NAME.run.TABLE]: settings of its runs alone; partitions: its own (all)
    [partition.NAME]  keys of [data]; data with a `client` column have that partition and no other
    [method.NAME]     method (default: NAME), [method.NAME.run.TABLE]; data, partitions, seeds: where it runs (all)

Later in this list goes over earlier. Paths are relative to the file. Every mistake is one ConfigError before any run.
"""

import hashlib
import json
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainfed_engine.config import Method, RunConfig, nearest_word
from chainfed_engine.config_file import build_config, dump_config, read_toml
from chainfed_engine.errors import ConfigError

NATURAL = "client"  # the partition of data with a client column
_TABLES = ("study", "run", "data", "partition", "method")
_STUDY_KEYS = ("methods", "seeds", "reference", "threads", "clock")
_METHOD_KEYS = ("method", "run", "data", "partitions", "seeds")
_PATH_KEYS = ("store", "train", "eval")


@dataclass(frozen=True)
class Run:
    """One run: where it stands in the study, its configuration, and the part of it that the study itself says."""

    method: str
    data: str
    partition: str
    seed: int
    config: RunConfig
    settings: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """A file name: readable, and another one for other settings. Defaults of the engine are not among them: a row
        names the version that it was made by."""
        words = (self.method, self.data, self.partition, f"seed-{self.seed}")
        readable = "--".join(re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-") for word in words)
        said = json.dumps(self.settings, sort_keys=True)
        return f"{readable[:120]}--{hashlib.sha256(said.encode()).hexdigest()[:12]}"

    @property
    def config_text(self) -> str:
        return dump_config(self.config)

    @property
    def cell(self) -> tuple[str, str]:
        return self.data, self.partition


@dataclass(frozen=True)
class Study:
    """`runs` in the order they are made: seed by seed, so that a study cut short still compares. `clock`: which seconds
    the comparison takes, "wall" or "cpu" (of one thread: the same on an idle machine)."""

    name: str
    runs: tuple[Run, ...]
    methods: tuple[str, ...]
    reference: str
    threads: int
    clock: str


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read STUDY.toml; `overrides`: `a.b.c=value` texts that replace or add keys, paths in them relative to the working
    directory. Raises ConfigError that names the file, or the override."""
    path = Path(path)
    document = read_toml(path)
    for override in overrides:
        _override(document, override)
    try:
        return _study(path.stem, document, path.parent.absolute())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _study(name: str, document: dict[str, Any], folder: Path) -> Study:
    _only(document, _TABLES, "table")
    head = _table(document, "study")
    _only(head, _STUDY_KEYS, "[study] key")
    methods, seeds = _names(head, "[study] methods", "methods"), _seeds(head.get("seeds", [0]), "[study] seeds")
    tables = _table(document, "method")
    engine = typing.get_args(Method)
    for method in methods:
        if method not in tables and method not in engine:
            raise ConfigError(f"[study] methods: unknown method {method!r}{nearest_word(method, [*tables, *engine])}")
    reference = head.get("reference", methods[0])
    if reference not in methods:
        raise ConfigError(
            f"[study] reference: expected one of the methods, got {reference!r}{nearest_word(str(reference), methods)}"
        )
    threads, clock = head.get("threads", 1), head.get("clock", "wall")
    if type(threads) is not int or not 1 <= threads <= 1024:
        raise ConfigError(f"[study] threads: expected a whole number from 1 up to 1024, got {threads!r}")
    if clock not in ("wall", "cpu"):
        raise ConfigError(f"[study] clock: expected 'wall' or 'cpu', got {clock!r}")
    cells = _cells(document)
    runs = [
        run
        for seed in _all_seeds(seeds, tables)
        for cell in cells
        for method in methods
        if (run := _run(document, folder, method, cell, seed, seeds)) is not None
    ]
    if not runs:
        raise ConfigError("the study has no run; look at data, partitions and seeds of its methods")
    return Study(name, tuple(runs), tuple(methods), reference, threads, clock)


def _cells(document: dict[str, Any]) -> list[tuple[str, str]]:
    """(data, partition) of every setting."""
    cells: list[tuple[str, str]] = []
    sets, partitions = _table(document, "data"), _table(document, "partition")
    if not sets:
        raise ConfigError("expected at least one [data.NAME], got none")
    for name in sets:
        if "client" in _table(sets, name, "data."):
            cells.append((name, NATURAL))
        elif not partitions:
            cells.append((name, "default"))
        else:
            wanted = sets[name].get("partitions", list(partitions))
            for each in wanted if isinstance(wanted, list) else [wanted]:
                if each not in partitions:
                    known = nearest_word(str(each), list(partitions))
                    raise ConfigError(f"[data.{name}] partitions: unknown name {each!r}{known}")
                cells.append((name, each))
    return cells


def _run(
    document: dict[str, Any], folder: Path, method: str, cell: tuple[str, str], seed: int, seeds: Sequence[int]
) -> Run | None:
    """The run of a method in a setting; None where the method does not run there."""
    data_name, partition = cell
    own = _table(_table(document, "method"), method, "method.")
    _only(own, _METHOD_KEYS, f"[method.{method}] key")
    for key, all_names, name in (
        ("data", list(_table(document, "data")), data_name),
        ("partitions", [*_table(document, "partition"), NATURAL, "default"], partition),
    ):
        wanted = own.get(key, all_names)
        for each in wanted:
            if each not in all_names:
                raise ConfigError(f"[method.{method}] {key}: unknown name {each!r}{nearest_word(str(each), all_names)}")
        if name not in wanted:
            return None
    if seed not in _seeds(own.get("seeds", list(seeds)), f"[method.{method}] seeds"):
        return None
    tables: dict[str, dict[str, Any]] = {}
    _merge(tables, _table(document, "run"), "run")
    for kind, name in (("data", data_name), ("partition", partition)):
        keys = _table(_table(document, kind), name, f"{kind}.")
        _merge(
            tables,
            {"data": {key: value for key, value in keys.items() if key not in ("run", "partitions")}},
            f"{kind}.{name}",
        )
        _merge(tables, _table(keys, "run", f"{kind}.{name}."), f"{kind}.{name}.run")
    _merge(tables, {"train": {"method": own.get("method", method), "seed": seed}}, "study")
    _merge(tables, _table(own, "run", f"method.{method}."), f"method.{method}.run")
    try:
        return Run(method, data_name, partition, seed, build_config(tables, folder), tables)
    except ConfigError as error:
        raise ConfigError(f"method {method}, data {data_name}, partition {partition}: {error}") from None


def _merge(into: dict[str, dict[str, Any]], tables: Mapping[str, Any], where: str) -> None:
    for table, keys in tables.items():
        if not isinstance(keys, dict):
            raise ConfigError(f"[{where}] {table}: expected a table such as [{where}.train], got a value")
        into.setdefault(table, {}).update(keys)


def _table(document: Mapping[str, Any], name: str, above: str = "") -> dict[str, Any]:
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"[{above}{name}]: expected a table, got {table!r:.60}")
    return table


def _only(keys: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in keys:
        if key not in known:
            raise ConfigError(f"unknown {what} {key!r}{nearest_word(key, known)}")


def _names(table: Mapping[str, Any], what: str, key: str) -> list[str]:
    names = table.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{what}: expected a list of names, got {names!r:.60}")
    if len(set(names)) != len(names):
        raise ConfigError(f"{what}: expected every name once, got {names!r:.120}")
    return names


def _seeds(seeds: Any, what: str) -> list[int]:
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ConfigError(f"{what}: expected a list of whole numbers from 0 up, got {seeds!r:.60}")
    return seeds


def _all_seeds(seeds: Sequence[int], tables: Mapping[str, Any]) -> list[int]:
    """Those of the study and those that only a method has, each once."""
    found = list(seeds)
    for name in tables:
        found += _seeds(_table(tables, name, "method.").get("seeds", list(seeds)), f"[method.{name}] seeds")
    return list(dict.fromkeys(found))


def _override(document: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    keys = _dotted(name) if equals else []
    if len(keys) < 2:
        raise ConfigError(f"--set {text}: expected table.key=value, for example data.ag_news.train=PATH")
    parsed: Any = value
    if keys[-1] in _PATH_KEYS:
        parsed = str(Path(value).absolute())
    else:
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value
    table: Any = document
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {text}: {key} is a value, not a table")
    table[keys[-1]] = parsed


def _dotted(name: str) -> list[str]:
    """Keys of a dotted TOML name, quoted parts included; empty if it is none."""
    try:
        level: Any = tomllib.loads(f"{name} = 0")
    except tomllib.TOMLDecodeError:
        return []
    keys: list[str] = []
    while isinstance(level, dict) and len(level) == 1:
        ((key, level),) = level.items()
        keys.append(key)
    return keys
