"""What a run reads before it starts: rows to tokens, labels of the run, the plan. Shared by all ways to run one.

In: a `RunConfig` and tables; out: encoded data, a plan, the label file of a run directory.
"""

import heapq
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from chainfed_engine import data
from chainfed_engine.config import RunConfig
from chainfed_engine.config_file import load_config
from chainfed_engine.data import EncodedData, Table, Tokenizer
from chainfed_engine.errors import ChainfedError, CorruptFile, DataError, StorageError
from chainfed_engine.federation.files import write_text
from chainfed_engine.federation.session import plan_for
from chainfed_engine.memory.parts import BATCH_TOKEN_BYTES, DataFacts
from chainfed_engine.memory.plan import Plan
from chainfed_engine.memory.stand_ins import profile_samples
from chainfed_engine.model.format import StoreInfo

LABELS_FILE = "labels.json"
_DAMAGED_LABELS = "the file is damaged: delete it, and take the run up with --resume, which writes it again"


def with_own_window(config: RunConfig, out: Path, *, resume: bool) -> RunConfig:
    """`config` with the window that the run in `out` began with, where it is left open: under another budget, or in a
    process that takes more, a plan would choose another and the run could not go on. A damaged config.toml says
    nothing: the run taken up writes it again, and its state tells whether the plan's window is its own."""
    if not resume or config.chain.window is not None:
        return config
    try:
        began = load_config(out / "config.toml").chain.window
    except ChainfedError:
        return config
    return replace(config, chain=replace(config.chain, window=began))


def plan_run(config: RunConfig, clients: Mapping[str, EncodedData], evaluation: EncodedData | None) -> Plan:
    """The run's plan, its samples counted in; nothing is written or allocated before it."""
    parts = [*clients.values(), *([evaluation] if evaluation is not None else [])]
    samples = sum(len(part) for part in clients.values())
    chain, largest = config.chain, max((part.num_tokens for part in parts), default=0)
    if chain.max_local_steps:
        largest = min(largest, chain.max_local_steps * chain.batch_size * chain.sequence_length)
    facts = DataFacts(
        longest_tokens=max((len(ids) for part in parts for ids in part.input_ids), default=None),
        mean_tokens=sum(part.num_tokens for part in clients.values()) / samples if samples else None,
        most_targets=max((part.most_targets for part in parts), default=None),
        largest_client_samples=max((len(part) for part in clients.values()), default=0),
        evaluation_samples=0 if evaluation is None else len(evaluation),
        num_clients=len(clients) or None,
        training_samples=samples or None,
        profile_lengths=_longest_samples(clients, profile_samples(chain, len(clients))),
        num_labels=max((len(part.label_names) for part in parts), default=0) or None,
    )
    info = StoreInfo.read(config.store)
    return plan_for(info, chain, config.data.task, data_bytes=BATCH_TOKEN_BYTES * largest, facts=facts)


def store_of_run(run_dir: Path, config: RunConfig) -> StoreInfo:
    """The layer store that a finished run was trained on. Raises StorageError, which says where its path stands, where
    it no longer is."""
    try:
        return StoreInfo.read(config.store)
    except StorageError as error:
        where = f"{run_dir / 'config.toml'}, [model] store; correct it there if the store was moved"
        raise StorageError(f"{error}; the run's store is named in {where}") from error


def _longest_samples(clients: Mapping[str, EncodedData], count: int) -> tuple[int, ...]:
    """The most tokens of any client's longest sample, of any's second longest, and so on to the `count`-th."""
    longest = (heapq.nlargest(count, map(len, part.input_ids)) for part in clients.values())
    return tuple(max(lengths) for lengths in zip_longest(*longest, fillvalue=0))


def complete(config: RunConfig, table: Table) -> Table:
    """The rows without a blank in a column that the run reads; a warning says how many were left out. With
    `missing` "error" the table as it is, for encoding names the first such row."""
    if config.data.missing == "error":
        return table
    names = [*config.data.needed, *([config.data.client] if config.data.client in table.columns else [])]
    kept = table.without_blanks([name for name in names if name is not None])
    if len(kept) < len(table):
        warnings.warn(
            f"{table.source}: {len(table) - len(kept)} of {len(table)} rows lack a value and are left out", stacklevel=2
        )
    return kept


def encode(config: RunConfig, table: Table, tokenizer: Tokenizer, labels: Sequence[str] | None) -> EncodedData:
    """The table's rows as the run's task wants them; `labels` None: those of the table."""
    length = config.chain.sequence_length
    if config.data.messages is not None:
        return data.encode_messages(table, tokenizer, messages=config.data.messages, max_length=length)
    if config.data.response is not None:
        return data.encode_causal(
            table, tokenizer, prompt=config.data.prompt, response=config.data.response, max_length=length
        )
    assert config.data.label is not None
    return data.encode_classification(
        table, tokenizer, text=config.data.text, label=config.data.label, labels=labels, max_length=length
    )


def deal_rows(config: RunConfig, table: Table, encoded: EncodedData) -> dict[str, EncodedData]:
    """Each client's samples; clients whose every row was dropped at encoding are left out."""
    settings, seed = config.data, config.chain.seed
    if settings.client is not None:
        rows = data.by_column(table, settings.client)
    elif settings.partition == "dirichlet":
        rows = data.dirichlet(encoded.labels, settings.num_clients, settings.alpha, seed)
    else:
        rows = data.iid(len(table), settings.num_clients, seed)
    parts = {name: encoded.of_rows(picked) for name, picked in rows.items()}
    return {name: part for name, part in parts.items() if len(part)}


def keep_labels(out: Path, labels: list[str], *, resume: bool) -> None:
    """Write labels.json once; a run that is taken up must have the same labels in the same order."""
    if resume and (out / LABELS_FILE).exists():
        if read_labels(out) != labels:
            raise DataError(f"{out}: resume: the data's labels differ from the saved run's; use the same data")
    elif labels:
        write_text(out / LABELS_FILE, json.dumps(labels))


def read_labels(run_dir: Path) -> list[str]:
    """Labels of a run. Raises StorageError, CorruptFile."""
    path = run_dir / LABELS_FILE
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}; expected the directory of a classification run") from error
    except ValueError as error:
        raise CorruptFile(f"{path}: expected a JSON list of labels; {_DAMAGED_LABELS}") from error
    if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
        raise CorruptFile(f"{path}: expected a JSON list of labels; {_DAMAGED_LABELS}")
    return labels
