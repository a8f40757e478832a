"""One site of a deployed federation: its own store, data and cache, answering messages as bytes. Free of transports.

In: header and payload of a message (codec.py); out: those of its answer. Four kinds: `hello` (who are you, what do you
hold), `setup` (how to train: configuration and labels of the run), `task` (a `Task`), `end` (the run is over). Whatever
goes wrong by the engine's own account becomes an answer with one line of error. The folder keeps setup, parameters and
boundary cache, so that a site that was restarted goes on where it was. Data, labels beyond their names, and caches
never leave it.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from chainfed_engine import data
from chainfed_engine._version import __version__
from chainfed_engine.client import Client
from chainfed_engine.config import ChainConfig, RunConfig
from chainfed_engine.data import EncodedData, Table, Tokenizer
from chainfed_engine.errors import ChainfedError, ConfigError, CorruptFile, InvalidArgument, MemoryBudgetExceeded
from chainfed_engine.federation import files
from chainfed_engine.federation.codec import pack, unpack
from chainfed_engine.federation.inputs import complete, encode, plan_run
from chainfed_engine.federation.messages import reply_record, task_from
from chainfed_engine.federation.session import open_trainer, running_out
from chainfed_engine.memory.plan import Plan
from chainfed_engine.model.format import StoreInfo
from chainfed_engine.schedule import num_window_layers
from chainfed_engine.types import Arrays

# What the site alone decides; everything else is the run's.
OWN_FIELDS = frozenset({"budget", "client_budgets", "device", "encrypt_cache"})
_MAX_LABELS, _MAX_LABEL_CHARS, _MAX_OUTCOME_CHARS = 65536, 1024, 500


def setup_record(config: ChainConfig, labels: list[str]) -> dict[str, Any]:
    """How to train, as the server tells every site; JSON-able."""
    settings = {name: value for name, value in asdict(config).items() if name not in OWN_FIELDS}
    return {"config": settings, "labels": labels}


def setup_digest(setup: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(setup, sort_keys=True).encode()).hexdigest()


class Site:
    """`config`: the site's own file: store, data, memory budget; the rest of its training settings is not read.
    `out`: the site's folder. The model is opened when the first task comes, not before."""

    def __init__(self, name: str, config: RunConfig, out: Path) -> None:
        self.name, self._config, self._out = name, config, out
        self._info = StoreInfo.read(config.store)
        self._tokenizer = Tokenizer.load(config.store, self._info.config)
        wanted = [*config.data.columns]
        self._table: Table = complete(config, data.read_table(config.data.train, wanted))
        self._setup: dict[str, Any] | None = None
        self._client: Client | None = None
        self._encoded: EncodedData | None = None
        self._plan: Plan | None = None
        self.run_ended: str | None = None  # how, once the server has said that its run is over
        files.make_folder(out)
        self._load_setup()

    def answer(self, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        """One message in, one out. Only what is no error of the engine's own passes through as an exception."""
        try:
            record, arrays = unpack(header, payload)
            kind = record.get("message")
            self.run_ended = _outcome(record.get("outcome")) if kind == "end" else None
            if kind == "end":
                return pack({"message": "ended", "site": self.name}, {})
            if kind == "hello":
                return pack(self._hello(), {})
            if kind == "setup":
                return pack(self._take_setup(record.get("setup")), {})
            if kind == "task":
                return self._do(record.get("task"), arrays)
            raise CorruptFile(f"message: expected hello, setup, task or end, got {kind!r:.60}")
        except ChainfedError as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            return pack({"message": "error", "site": self.name, "error": line[:2000]}, {})

    def close(self) -> None:
        """Free the model. An encrypted cache goes too: nobody can read it any more."""
        self._client = None
        if self._config.chain.encrypt_cache:
            shutil.rmtree(self._out / "cache", ignore_errors=True)

    def _hello(self) -> dict[str, Any]:
        label = self._config.data.label
        held = self._client.held_versions if self._client is not None else {}
        return {
            "message": "hello",
            "site": self.name,
            "version": __version__,
            "base": self._info.fingerprint,
            "task": self._config.data.task,
            "labels": sorted(set(self._table.names(label))) if label is not None else [],
            "setup": setup_digest(self._setup) if self._setup is not None else None,
            "held": held,
        }

    def _take_setup(self, setup: object) -> dict[str, Any]:
        """Prepare to train as the server says; the answer: samples, layers that this site's memory can train."""
        if not isinstance(setup, dict) or setup != self._setup:
            self._client, self._setup = None, _checked(setup)
            self._prepare()
            files.write_text(self._out / "setup.json", json.dumps(self._setup))
        client = self._ready()
        answer = {"message": "ready", "site": self.name, "num_samples": client.num_samples}
        return {**answer, "max_window": client.max_window, "held": client.held_versions}

    def _do(self, record: object, arrays: Arrays) -> tuple[bytes, bytes]:
        if self._setup is None:
            raise InvalidArgument("this site was not told how to train; the server has to send a setup first")
        client = self._ready()
        assert self._plan is not None
        with running_out(self._config.chain, self._plan):
            reply = client.handle(task_from(record, arrays))
        return pack({"message": "reply", "reply": reply_record(reply)}, reply.arrays)

    def _load_setup(self) -> None:
        path = self._out / "setup.json"
        try:
            self._setup = _checked(json.loads(path.read_text(encoding="utf-8")))
            self._prepare()
        except FileNotFoundError:
            return
        except (ValueError, ChainfedError):
            self._setup = None  # damaged, or of another version: the server is asked for it anew

    def _prepare(self) -> None:
        """Encode the data and find the largest window that the site's own budget holds."""
        assert self._setup is not None
        chain = _chain(self._setup, self._config.chain)
        config = replace(self._config, chain=chain)
        self._encoded = encode(config, self._table, self._tokenizer, self._setup["labels"] or None)
        self._plan, self._max_window = _largest_plan(config, self._encoded)

    def _ready(self) -> Client:
        if self._client is None:
            if self._encoded is None:
                self._prepare()
            assert self._setup is not None and self._plan is not None and self._encoded is not None
            chain = self._plan.recorded_in(_chain(self._setup, self._config.chain))
            labels = len(self._setup["labels"])
            trainer = open_trainer(
                Path(self._config.store), chain, self._plan, self._config.data.task, num_labels=labels
            )
            self._client = Client(
                self.name,
                self._encoded,
                trainer,
                cache_dir=self._out / "cache",
                pad_id=self._tokenizer.pad_id,
                base=self._info.fingerprint,
                max_window=self._max_window,
                held_dir=self._out / "adapters",
            )
        return self._client


def _largest_plan(config: RunConfig, encoded: EncodedData) -> tuple[Plan, int | None]:
    """The plan within the site's budget, and its window where that is smaller than the run's."""
    num_layers = StoreInfo.read(config.store).num_layers
    wanted = num_window_layers(config.chain.window, num_layers, config.chain.start_layer)
    for window in range(wanted, 0, -1):
        chain = replace(config.chain, window=window)
        try:
            plan = plan_run(replace(config, chain=chain), {"site": encoded}, None)
        except MemoryBudgetExceeded:
            if window == 1 or config.chain.method != "chain":
                raise
            continue
        return plan, None if window == wanted else window
    raise AssertionError("a window has at least one layer")


def _chain(setup: Mapping[str, Any], own: ChainConfig) -> ChainConfig:
    """The run's settings with what this site decides for itself."""
    return ChainConfig(**{**setup["config"], **{name: getattr(own, name) for name in OWN_FIELDS}})


def _outcome(said: object) -> str:
    """A line from the network, for a terminal."""
    text = said if isinstance(said, str) else "the server does not say how"
    return "".join(mark if mark.isprintable() else " " for mark in text[:_MAX_OUTCOME_CHARS])


def _checked(setup: object) -> dict[str, Any]:
    """A setup from the network or disk. Raises CorruptFile, ConfigError."""
    if not isinstance(setup, dict) or set(setup) != {"config", "labels"} or not isinstance(setup["config"], dict):
        raise CorruptFile("setup: expected config and labels; install the same chainfed-engine on both sides")
    known = {item.name for item in fields(ChainConfig)} - OWN_FIELDS
    if set(setup["config"]) != known:
        differing = sorted(map(str, set(setup["config"]) ^ known))[:3]
        raise ConfigError(f"setup: settings differ from this version's: {differing}; install the same chainfed-engine")
    labels = setup["labels"]
    texts = isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    if not texts or len(labels) > _MAX_LABELS or any(len(name) > _MAX_LABEL_CHARS for name in labels):
        raise CorruptFile("setup: expected labels as a list of short texts")
    ChainConfig(**setup["config"])
    return setup
