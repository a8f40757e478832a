"""The public functions behind `import chainfed_engine as cfe` and the command line: plan, fit, run, evaluate."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from chainfed_engine import data
from chainfed_engine.callbacks import Callback, notify
from chainfed_engine.config import ChainConfig, DataConfig, RunConfig, parse_sizes
from chainfed_engine.config_file import dump_config, load_config
from chainfed_engine.data import EncodedData, Table, Tokenizer, budgets
from chainfed_engine.errors import DataError, InvalidArgument, MemoryBudgetExceeded, StorageError
from chainfed_engine.federation import RunDirectory, read_adapters
from chainfed_engine.federation.inputs import (
    complete,
    deal_rows,
    encode,
    keep_labels,
    plan_run,
    read_labels,
    store_of_run,
    with_own_window,
)
from chainfed_engine.federation.run_directory import NOISE_KEY_FILE, check_free
from chainfed_engine.federation.session import Session, check_choices, open_trainer, plan_for, running_out
from chainfed_engine.memory.plan import Plan
from chainfed_engine.model.format import StoreInfo
from chainfed_engine.types import Arrays, TaskKind


@dataclass(frozen=True)
class Result:
    """What a run left: `parameters` float32 by name, `evaluation` figures ({} without evaluation data), `events`: what
    it wrote to metrics.jsonl, from where it was taken up if it was."""

    parameters: Arrays
    evaluation: Mapping[str, float]
    events: list[dict[str, Any]]
    directory: Path

    def save(self, path: str | Path) -> Path:
        """Copy the run directory (adapters, configuration, metrics, state; no caches) to a new folder `path`."""
        target = Path(path)
        if target.exists():
            raise StorageError(f"{target}: exists already; choose another folder")
        shutil.copytree(
            self.directory, target, ignore=shutil.ignore_patterns("cache", "lock", NOISE_KEY_FILE, "flower")
        )
        return target


def plan(
    store: str | Path,
    config: ChainConfig | None = None,
    *,
    task: TaskKind | None = None,
    **options: Any,
) -> Plan:
    """Predicted peak memory of a run, part by part, and the planner's choices; nothing is allocated.

    `options` are ChainConfig fields (budget, sequence_length, batch_size, window, ...). `task` defaults to the LM loss
    for a model with an LM head. Raises MemoryBudgetExceeded naming the smallest budget that would do.
    """
    info = StoreInfo.read(store)
    chosen: TaskKind = task or ("causal-lm" if info.head_shards else "classification")
    return plan_for(info, replace(_checked(config), **options), chosen)


def fit(
    store: str | Path,
    clients: Any,
    config: ChainConfig | None = None,
    *,
    evaluation: Any = None,
    text: str = "text",
    label: str | None = None,
    prompt: str = "prompt",
    response: str | None = None,
    messages: str | None = None,
    client: str = "client",
    missing: Literal["error", "drop"] = "error",
    hold_out: float = 0.0,
    out: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    on_event: Callable[[Mapping[str, Any]], None] | None = None,
) -> Result:
    """Fine-tune in process. `clients`: a mapping from name to examples, or one table with a client column.

    Examples are lists of dicts, a data frame, a `datasets.Dataset` or the path of a CSV, TSV, JSON(L) or Parquet file.
    The task follows from the columns: `label` (classification), `response` or `messages` (causal LM, loss on the
    response or on the assistant's turns); they default to the column of that name that is there. `missing`: "drop"
    leaves out rows with a blank, "error" names the first. `hold_out`: share of rows to evaluate on if `evaluation` is
    None. `out` keeps the run directory, else `Result.save` does. `callbacks` and `on_event` see every event.

    Raises MemoryBudgetExceeded (bytes) before anything is allocated, DataError naming column and row, ConfigError,
    CorruptFile for a damaged store, NonFiniteLoss; InvalidArgument if `out` holds a run.

        reviews = {"anna": [{"text": "a fine film", "label": "good"}, {"text": "dull", "label": "bad"}] * 8}
        result = cfe.fit("store", reviews, cfe.ChainConfig(budget="1GiB", rounds=4), hold_out=0.25)
        result.evaluation["accuracy"]
    """
    config = _checked(config)
    table, column = _client_table(clients, client)
    if label is None and response is None and messages is None:
        label, response, messages = _task_columns(set(table.columns) - {column})
    columns = DataConfig(
        train="(in memory)",
        text=text,
        label=label,
        prompt=prompt,
        response=response,
        messages=messages,
        missing=missing,
        hold_out=0.0 if evaluation is not None else hold_out,
        client=column,
    )
    held_out = None if evaluation is None else data.as_table(evaluation, "evaluation")
    run_config = RunConfig(chain=config, data=columns, store=str(Path(store).absolute()))
    if out is not None:
        return _run(run_config, table, held_out, Path(out), resume=False, callbacks=_watchers(callbacks, on_event))
    directory = Path(tempfile.mkdtemp(prefix="chainfed-run-"))
    try:
        result = _run(run_config, table, held_out, directory, resume=False, callbacks=_watchers(callbacks, on_event))
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    weakref.finalize(result, shutil.rmtree, directory, ignore_errors=True)  # it lives as long as the result
    return result


def run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    on_event: Callable[[Mapping[str, Any]], None] | None = None,
) -> Result:
    """What `chainfed run` does: the whole federation of a configuration file, into the directory `out`."""
    wanted = [*config.data.columns, *filter(None, (config.data.client, config.data.client_budget))]
    table = data.read_table(config.data.train, wanted)
    held_out = data.read_table(config.data.eval, config.data.columns) if config.data.eval else None
    return _run(config, table, held_out, Path(out), resume=resume, callbacks=_watchers(callbacks, on_event))


def evaluate(run_dir: str | Path, data_file: str | Path, *, device: str | None = None) -> dict[str, float]:
    """Accuracy or token loss of a finished run on a data file, streamed under the run's own budget, on `device` or
    where the run was."""
    run_dir = Path(run_dir)
    arrays, _ = read_adapters(run_dir)  # first: its error says what is no run directory
    config = load_config(run_dir / "config.toml", [] if device is None else [f"train.device={device}"])
    tokenizer = Tokenizer.load(config.store, store_of_run(run_dir, config).config)
    table = complete(config, data.read_table(data_file, config.data.columns))
    encoded = encode(config, table, tokenizer, read_labels(run_dir) if config.data.label else None)
    plan = plan_run(config, {}, encoded)
    trainer = open_trainer(Path(config.store), config.chain, plan, encoded.task, num_labels=len(encoded.label_names))
    with closing(trainer.model.store), running_out(config.chain, plan):
        ordered = data.batches(encoded, config.chain.batch_size, seed=None, pad_id=tokenizer.pad_id)
        return trainer.evaluate(ordered, arrays)


def _run(
    config: RunConfig,
    table: Table,
    held_out: Table | None,
    out: Path,
    *,
    resume: bool,
    callbacks: Sequence[Callback],
) -> Result:
    error: str | None = None
    try:
        return _train(config, table, held_out, out, resume=resume, callbacks=callbacks)
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
        raise
    finally:
        notify(callbacks, {"event": "end", "error": error})


def _train(
    config: RunConfig,
    table: Table,
    held_out: Table | None,
    out: Path,
    *,
    resume: bool,
    callbacks: Sequence[Callback],
) -> Result:
    check_free(out, resume=resume)  # before minutes of work that could not be kept
    check_choices(StoreInfo.read(config.store), config.chain, config.data.task)
    config = with_own_window(_with_pooling(config), out, resume=resume)
    table, held_out = complete(config, table), None if held_out is None else complete(config, held_out)
    if held_out is None and config.data.hold_out:
        named = None if config.data.label is None else table.names(config.data.label)
        kept, held = data.hold_out(named, len(table), config.data.hold_out, config.chain.seed)
        table, held_out = table.select(kept), table.select(held)
    tokenizer = Tokenizer.load(config.store, StoreInfo.read(config.store).config)
    encoded = encode(config, table, tokenizer, None)
    labels = list(encoded.label_names)
    evaluation = None if held_out is None else encode(config, held_out, tokenizer, labels or None)
    clients = deal_rows(config, table, encoded)
    plan, absent = _plan(config, table, clients, evaluation)
    clients = {name: part for name, part in clients.items() if name not in absent}
    recorded = replace(config, chain=plan.recorded_in(config.chain))
    # The session first: what it refuses (a damaged store, choices that do not fit the model) must leave no run behind.
    with (
        Session(
            Path(config.store), config.chain, clients, evaluation, out, plan=plan, pad_id=tokenizer.pad_id
        ) as session,
        RunDirectory(out, config_text=dump_config(recorded), resume=resume) as directory,
    ):
        keep_labels(out, labels, resume=resume)
        if absent and not resume:
            event: dict[str, Any] = {"event": "clients", "round": -1, "num_clients": len(clients), "left_out": absent}
            event["predicted_peak_bytes"] = plan.predicted_peak_bytes
            directory.record(event)
            notify(callbacks, event)
        result = session.run(directory, on_event=partial(notify, callbacks), resume=resume)
        events = directory.recorded()
    return Result(result.parameters, result.evaluation, events, out)


def _checked(config: ChainConfig | None) -> ChainConfig:
    """The default for None. Raises InvalidArgument for what is no configuration, such as a dict."""
    if config is not None and not isinstance(config, ChainConfig):
        raise InvalidArgument(f"config: expected a cfe.ChainConfig, got {type(config).__name__}")
    return config or ChainConfig()


def _with_pooling(config: RunConfig) -> RunConfig:
    """The pooling that "auto" stands for, so that config.toml tells what the classifier reads."""
    if config.data.label is None or config.chain.pooling != "auto":
        return config
    from chainfed_engine.model.families import chosen_pooling

    info = StoreInfo.read(config.store)
    chosen = chosen_pooling("auto", info.pooling, info.architecture)
    return replace(config, chain=replace(config.chain, pooling=chosen))


def _watchers(
    callbacks: Sequence[Callback], on_event: Callable[[Mapping[str, Any]], None] | None
) -> Sequence[Callback]:
    for callback in callbacks:
        if not callable(getattr(callback, "on_event", None)):
            raise InvalidArgument(
                f"callbacks: expected objects with on_event(event), got {callback!r}; a function alone is for on_event="
            )
    return [*callbacks, *([_Function(on_event)] if on_event is not None else [])]


@dataclass(frozen=True)
class _Function:
    """A plain function as a callback."""

    on_event: Callable[[Mapping[str, Any]], None]


def _plan(
    config: RunConfig, table: Table, clients: Mapping[str, EncodedData], evaluation: EncodedData | None
) -> tuple[Plan, dict[str, int]]:
    """The run's plan, and the clients whose own memory cannot hold the method, by that plan's prediction, with the
    bytes that they have. A window left open is as wide as leaves as few out as can be (the paper's own rule)."""
    plan, sizes = plan_run(config, clients, evaluation), _client_budgets(config, table, clients)
    if not sizes:
        return plan, {}
    plans = [plan]
    if config.chain.window is None and config.chain.method in ("chain", "top-window"):
        for window in range(plan.choices.window - 1, 0, -1):
            if plans[-1].predicted_peak_bytes <= min(sizes.values()):
                break
            narrower = replace(config, chain=replace(config.chain, window=window))
            with suppress(MemoryBudgetExceeded):  # one that slides needs stand-ins, which one at the top does without
                plans.append(plan_run(narrower, clients, evaluation))
    plan = min(plans, key=lambda one: sum(size < one.predicted_peak_bytes for size in sizes.values()))
    return plan, budgets.left_out(sizes, plan.predicted_peak_bytes, config.chain.method)


def _client_budgets(config: RunConfig, table: Table, clients: Mapping[str, EncodedData]) -> dict[str, int]:
    """Bytes that each client has; empty where nothing is said."""
    column, listed = config.data.client_budget, config.chain.client_budgets
    if column is not None:
        return budgets.by_column(table, column, {name: part.rows for name, part in clients.items()})
    if listed is not None:
        return budgets.dealt(clients, parse_sizes("[federation] client_budgets", listed), config.chain.seed)
    return {}


def _task_columns(names: set[str]) -> tuple[str | None, str | None, str | None]:
    """label, response and messages: the first that is a column by its own name, the others None."""
    known = ("label", "response", "messages")
    found = next((name for name in known if name in names), None)
    if found is None:
        raise DataError(
            "clients: expected a column 'label', 'response' or 'messages', or its name as an argument; there are "
            f"{', '.join(map(repr, sorted(names)))}"
        )
    label, response, messages = (name if name == found else None for name in known)
    return label, response, messages


def _client_table(clients: Any, column: str) -> tuple[Table, str]:
    """One table with a client column, from a mapping of tables or a table that has one."""
    splits = isinstance(getattr(clients, "column_names", None), dict)  # a DatasetDict: training and test are no clients
    if splits or not isinstance(clients, Mapping):
        table = data.as_table(clients, "clients")
        if column not in table.columns:
            raise DataError(f"clients: expected a column {column!r} or a mapping from client name to examples")
        return table, column
    rows: list[dict[str, Any]] = []
    for name, examples in clients.items():
        part = data.as_table(examples, f"client {name}")
        columns = {key: part.column(key) for key in part.columns}
        rows += [{**{key: values[row] for key, values in columns.items()}, column: name} for row in range(len(part))]
    return data.as_table(rows, "clients"), column
