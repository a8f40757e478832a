"""Every choice of a run: `ChainConfig` (flat), `DataConfig`, and the two together with the store as `RunConfig`.

Each field carries in its metadata the TOML table it belongs to and its range, so that loading, checking and writing
need no second list. Fields that may be "auto" are resolved by the planner and recorded in the run's own config.toml;
what the user fixed is never changed. Every mistake is one `ConfigError` that says what was expected.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chainfed_engine.errors import ConfigError
from chainfed_engine.sizes import parse_size
from chainfed_engine.types import TaskKind

Method = Literal["chain", "none", "linear-probe", "top-window", "full-adapters"]


def _in(
    table: str,
    default: Any,
    *,
    low: float = 0,
    high: float = 2**31 - 1,
    above: bool = False,
    none: str | None = None,
    size: bool = False,
) -> Any:
    """A field of `[table]`. Numbers lie in low..high (`above`: low itself is out); `none`: the word that means None;
    `size`: bytes, as a number or as text with a unit."""
    metadata = {"table": table, "low": low, "high": high, "above": above, "none": none, "size": size}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ChainConfig:
    """How to train. `budget` also takes text such as "1GiB". Raises ConfigError for a wrong type or range."""

    pooling: Literal["auto", "mean", "first", "last"] = _in("model", "auto")

    window: int = _in("chain", 2, low=1, high=1024)
    auxiliary_weight: float = _in("chain", 0.2, high=100)
    # 0-based; None: from `threshold` by CKA, for causal LMs no lower than one window below the topmost
    start_layer: int | None = _in("chain", None, high=1023, none="auto")
    threshold: float = _in("chain", 0.8, high=1)
    schedule: Literal["continuous", "train-and-freeze"] = _in("chain", "continuous")
    rounds: int = _in("chain", 24, low=1)
    # rounds that first fit the classifier in closed form; None: a fifth of them, at most 4, none for causal LMs
    probe_rounds: int | None = _in("chain", None, none="auto")
    adapter: Literal["bottleneck", "lora"] = _in("chain", "bottleneck")
    adapter_size: int = _in("chain", 16, low=1, high=4096)  # bottleneck width or LoRA rank
    stand_in: bool = _in("chain", True)
    # relative to the mean squared column; None: by cross-validation
    stand_in_ridge: float | None = _in("chain", None, above=True, high=1e6, none="auto")

    method: Method = _in("train", "chain")  # noqa: RUF009 (an alias of Literal, immutable)
    lr: float = _in("train", 1e-3, above=True, high=10)
    weight_decay: float = _in("train", 0.01, high=10)
    batch_size: int = _in("train", 16, low=1, high=65536)
    sequence_length: int = _in("train", 128, low=2, high=2**20)
    local_epochs: int = _in("train", 1, low=1, high=10**6)
    max_local_steps: int = _in("train", 0)  # 0: no limit
    seed: int = _in("train", 0, high=2**63 - 1)

    # bytes; None: no limit
    budget: int | None = _in("memory", None, low=2**20, high=2**50, none="none", size=True)
    cache_format: Literal["auto", "int8", "bf16", "f32"] = _in("memory", "auto")

    clients_per_round: int = _in("federation", 5, low=1)
    profile_clients: int = _in("federation", 16, low=1)
    eval_every: int = _in("federation", 0)  # 0: only at the end

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.probe_rounds is not None and self.probe_rounds > self.rounds:
            raise ConfigError(
                f"[chain] probe_rounds: expected at most [chain] rounds ({self.rounds}), got {self.probe_rounds}"
            )


@dataclass(frozen=True)
class DataConfig:
    """Where the examples are. The task follows from the columns: `label` (classification) or `response` (causal LM).

    Clients are named by the `client` column; without one the rows are dealt to `num_clients` clients by `partition`
    ("auto": "dirichlet" over the labels where there are labels, else "iid").
    """

    train: str = _in("data", "")
    eval: str | None = _in("data", None, none="none")
    text: str = _in("data", "text")
    label: str | None = _in("data", None, none="none")
    prompt: str = _in("data", "prompt")
    response: str | None = _in("data", None, none="none")
    client: str | None = _in("data", None, none="none")
    partition: Literal["auto", "dirichlet", "iid"] = _in("data", "auto")
    alpha: float = _in("data", 1.0, above=True, high=1e6)  # small: clients of few labels; large: like IID
    num_clients: int = _in("data", 8, low=1, high=10**6)

    def __post_init__(self) -> None:
        _check_fields(self)
        if not self.train:
            raise ConfigError("[data] train: expected the path of a CSV, JSONL or Parquet file, got none")
        if (self.label is None) == (self.response is None):
            given = "neither" if self.label is None else "both"
            raise ConfigError(f"[data]: expected label (classification) or response (causal LM), got {given}")
        if self.partition == "auto":
            object.__setattr__(self, "partition", "dirichlet" if self.label is not None else "iid")
        if self.partition == "dirichlet" and self.label is None and self.client is None:
            raise ConfigError('[data] partition: "dirichlet" needs [data] label; use partition = "iid" or name client')

    @property
    def task(self) -> TaskKind:
        return "causal-lm" if self.label is None else "classification"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the training table that this run reads, without the client column."""
        return (self.prompt, self.response) if self.response is not None else (self.text, self.label or "")


@dataclass(frozen=True)
class RunConfig:
    """A whole run: `store` is the path of the layer store, all paths absolute once loaded from a file."""

    chain: ChainConfig
    data: DataConfig
    store: str


_PATHS = {("model", "store"), ("data", "train"), ("data", "eval")}
_CLASSES: tuple[type[ChainConfig] | type[DataConfig], ...] = (ChainConfig, DataConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read CONFIG.toml; `overrides` are `table.key=value` texts that replace or add keys.

    Paths in the file are relative to its folder, paths in overrides to the working directory. Raises ConfigError,
    naming file, table, key and, for an unknown key, the nearest known one.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
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


def _flatten(document: dict[str, Any], folder: Path) -> dict[tuple[str, str], Any]:
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
    if str not in _choices(hint):
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value
    return {(table, key): _known_value(table, key, parsed, Path.cwd())}


def _known_value(table: str, key: str, value: Any, folder: Path) -> Any:
    """The value checked against the key's type and range, paths made absolute. ConfigError for an unknown key."""
    known = _known()
    if table not in {name for name, _ in known}:
        raise ConfigError(f"[{table}]: unknown table{_nearest(table, sorted({name for name, _ in known}))}")
    if (table, key) not in known:
        nearest = _nearest(key, [name for owner, name in known if owner == table])
        elsewhere = [owner for owner, name in known if name == key]
        nearest = f"; {key} belongs in [{elsewhere[0]}]" if elsewhere else nearest
        raise ConfigError(f"[{table}] {key}: unknown key{nearest}")
    hint, metadata = known[table, key]
    value = _checked(f"[{table}] {key}", hint, metadata, value)
    return str(folder / value) if (table, key) in _PATHS and value else value


def _build(values: dict[tuple[str, str], Any]) -> RunConfig:
    if not values.get(("model", "store")):
        raise ConfigError("[model] store: expected the path of a layer store (see `chainfed convert`), got none")
    records: list[Any] = []
    for record in _CLASSES:
        names = {(item.metadata["table"], item.name) for item in dataclasses.fields(record)}
        records.append(record(**{key: value for (table, key), value in values.items() if (table, key) in names}))
    return RunConfig(chain=records[0], data=records[1], store=values["model", "store"])


def _check_fields(record: ChainConfig | DataConfig) -> None:
    hints = typing.get_type_hints(type(record))
    for item in dataclasses.fields(record):
        name = f"[{item.metadata['table']}] {item.name}"
        value = _checked(name, hints[item.name], item.metadata, getattr(record, item.name))
        object.__setattr__(record, item.name, value)


def _choices(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a hint: (int, NoneType) for `int | None`, (int,) for int."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _checked(name: str, hint: Any, metadata: Mapping[str, Any], value: Any) -> Any:
    """`value` as the field keeps it. Raises ConfigError: what was expected, what came."""
    if typing.get_origin(hint) is Literal:
        words = typing.get_args(hint)
        if value not in words:
            nearest = _nearest(value, list(words)) if isinstance(value, str) else ""
            raise ConfigError(f"{name}: expected one of {', '.join(map(repr, words))}, got {value!r}{nearest}")
        return value
    choices = _choices(hint)
    if type(None) in choices and (value is None or (isinstance(value, str) and value == metadata["none"])):
        return None
    if metadata["size"]:
        try:
            value = parse_size(value)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
    kind = choices[0]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        also = f' or "{metadata["none"]}"' if metadata["none"] else ""
        raise ConfigError(f"{name}: expected {_KINDS[kind]}{also}, got {value!r}")
    if kind in (int, float):
        _check_range(name, metadata, value)
    return value


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _check_range(name: str, metadata: Mapping[str, Any], value: float) -> None:
    low, high, above = metadata["low"], metadata["high"], metadata["above"]
    if not math.isfinite(value) or not (low < value if above else low <= value) or value > high:
        start = f"above {low}" if above else f"from {low}"
        raise ConfigError(f"{name}: expected a number {start} up to {high}, got {value}")


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
