"""All that a federation in this process needs, built in the order in which it costs memory.

store -> plan (refuses before anything is allocated) -> frozen model -> trainer -> clients -> server. One base in memory
however many clients; a client is its encoded data and a cache folder.
"""

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from chainfed_engine import native
from chainfed_engine.client import Client
from chainfed_engine.config import ChainConfig
from chainfed_engine.data import EncodedData
from chainfed_engine.errors import ConfigError
from chainfed_engine.federation.events import plan_event
from chainfed_engine.federation.patience import Patience
from chainfed_engine.federation.run import FitResult, fit
from chainfed_engine.federation.run_directory import RunDirectory
from chainfed_engine.federation.transport_local import LocalTransport
from chainfed_engine.memory.device import DeviceFacts, device_memory_errors, hold_to_budget, peak_device_bytes
from chainfed_engine.memory.lean import set_heap
from chainfed_engine.memory.parts import DataFacts, Request, StoreSizes, keeps_deep_graphs
from chainfed_engine.memory.plan import Plan, make_plan
from chainfed_engine.methods import trainer_class
from chainfed_engine.model.format import StoreInfo
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.place import find_place
from chainfed_engine.model.store import LayerStore
from chainfed_engine.server import Server
from chainfed_engine.server.plan import Plan as RoundPlan
from chainfed_engine.step import StageTrainer
from chainfed_engine.types import TaskKind

Event = Mapping[str, Any]


def plan_for(
    info: StoreInfo, config: ChainConfig, task: TaskKind, *, data_bytes: int = 0, facts: DataFacts | None = None
) -> Plan:
    """The plan of a run with this store on this process. `data_bytes`: a client's batches; `facts`: of the samples,
    where they are known. Raises MemoryBudgetExceeded, and ConfigError for choices that this model cannot keep."""
    import chainfed_engine.model.families as families
    from chainfed_engine.memory.settle import settled_rss_bytes, startup_peak_bytes

    check_choices(info, config, task)
    families.family(info.architecture)  # the library's modelling code belongs to the interpreter's share
    place = find_place(config.device)
    device = None
    if place.is_cuda:
        device = DeviceFacts(str(place.torch_device), place.is_unified, place.library_from_tokens)
    if task == "classification":
        chosen = families.chosen_pooling(config.pooling, info.pooling, info.architecture)
        config = replace(config, pooling=chosen)
    facts, startup = facts or DataFacts(), startup_peak_bytes()
    return make_plan(
        Request(info.shape, store_sizes(info), config, task, settled_rss_bytes(), data_bytes, facts, device, startup)
    )


def check_choices(info: StoreInfo, config: ChainConfig, task: TaskKind) -> None:
    """Raises ConfigError for a window, sequence length or task that the model of this store does not have."""
    RoundPlan(config, info.num_layers, task)
    if config.sequence_length > info.shape.max_positions:
        raise ConfigError(
            f"[train] sequence_length: the model has positions for {info.shape.max_positions} tokens, got "
            f"{config.sequence_length}; lower it (longer texts are cut to it)"
        )
    if task == "causal-lm" and not info.head_shards:
        raise ConfigError(f"task: {info.architecture} at {info.path} has no LM head; give labels for classification")


def store_sizes(info: StoreInfo) -> StoreSizes:
    """Bytes by role, from the index alone."""
    layers = [file.file_bytes for file in info.layers]
    head = [file.file_bytes for file in info.head_shards]
    return StoreSizes(
        layer_bytes=sum(layers),
        head_bytes=sum(head),
        embedding_bytes=info.embedding.file_bytes,
        slot_bytes=max([*layers, *head]),
        num_layers=len(layers),
        num_head_shards=len(head),
    )


def open_trainer(store: Path, config: ChainConfig, plan: Plan, task: TaskKind, *, num_labels: int) -> StageTrainer:
    """The frozen model of a store, checked against its checksums, and a trainer for it, as the plan says. A device with
    memory of its own is held to the budget from here on."""
    choices, place = plan.choices, find_place(config.device)
    set_heap(choices.kept_heap_bytes, deep_graphs=keeps_deep_graphs(config, choices.window))
    native.set_num_threads(torch.get_num_threads())
    if place.index is not None and not place.is_unified and config.budget_bytes is not None:
        hold_to_budget(place.index, config.budget_bytes)
    with running_out(config, plan):
        return trainer_class(config.method)(
            FrozenModel(LayerStore.open(store, num_slots=choices.num_slots, verify=True, place=place)),
            config,
            task=task,
            num_labels=num_labels,
            cache_format=choices.cache_format,
            micro_batch=0 if choices.micro_batch >= config.batch_size else choices.micro_batch,
            recompute=choices.recompute,
            fill_bytes=choices.fill_bytes,
        )


def running_out(config: ChainConfig, plan: Plan) -> AbstractContextManager[None]:
    """Around work on a device: running out of its memory names the budget that would do."""
    return device_memory_errors(config.device, plan.predicted_peak_bytes, plan.smallest_budget_bytes)


class Session:
    """A run of `config` over the data of at least one client, in `out`, as `plan` says. A context manager."""

    def __init__(
        self,
        store: Path,
        config: ChainConfig,
        clients: Mapping[str, EncodedData],
        evaluation: EncodedData | None,
        out: Path,
        *,
        plan: Plan,
        pad_id: int,
    ) -> None:
        first = next(iter(clients.values()))
        self.task = first.task
        num_labels = len(first.label_names)
        self.plan = plan
        self.config = plan.recorded_in(config)
        self.trainer = open_trainer(store, self.config, plan, self.task, num_labels=num_labels)
        self.store = self.trainer.model.store
        base = self.store.fingerprint
        self._cache = out / "cache"
        members = [
            Client(name, data, self.trainer, cache_dir=self._cache / folder_name(name), pad_id=pad_id, base=base)
            for name, data in clients.items()
        ]
        self.transport = LocalTransport(members, patience=Patience.of(self.config))
        self.evaluator = Client("evaluator", evaluation, self.trainer, pad_id=pad_id, base=base) if evaluation else None
        initial = self.trainer.parameters.export()
        samples = self.transport.client_samples
        self.server = Server(self.config, self.trainer.model.shape, initial, samples, self.task, base=base)

    def run(
        self, directory: RunDirectory, *, on_event: Callable[[Event], None] | None = None, resume: bool = False
    ) -> FitResult:
        """Rounds to the end; every event gets the number of rounds and the prediction beside the measurement."""

        def emit(event: dict[str, Any]) -> None:
            if on_event is not None:
                on_event({"rounds": self.config.rounds, **event})

        if not resume:
            event = plan_event(self.plan)
            directory.record(event)
            emit(event)
        with running_out(self.config, self.plan):
            return fit(
                self.server,
                self.transport,
                self.evaluator,
                directory,
                on_event=emit,
                resume=resume,
                measure_memory=self._memory,
            )

    def close(self) -> None:
        self.trainer.end()
        self.store.close()
        if self.config.encrypt_cache:  # nobody can read it any more
            shutil.rmtree(self._cache, ignore_errors=True)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _memory(self) -> dict[str, int]:
        """Figures of a `memory` event, all since the process or the store's opening: the kernel's peak of the resident
        set (and of the memory cgroup, where this process is alone in one), pages of our files in the page cache now,
        bytes the store has read, time inside reads and time anyone waited for them."""
        from chainfed_engine.memory.cgroup import MemoryGroup
        from chainfed_engine.memory.meter import peak_rss_bytes, resident_file_bytes, rss_bytes

        stats, group = self.store.stats(), MemoryGroup.of_this_process()
        cached = resident_file_bytes([self.store.info.path, self._cache])
        group_peak = None if group is None else group.peak_bytes()
        figures = {
            "peak_rss_bytes": peak_rss_bytes(),
            "predicted_peak_bytes": self.plan.predicted_peak_bytes,
            "rss_bytes": rss_bytes(),
            **({} if cached is None else {"page_cache_bytes": cached}),
            **({} if group_peak is None else {"cgroup_peak_bytes": group_peak}),
            "store_resident_bytes": stats["resident_bytes"],
            "bytes_read": stats["bytes_read"],
            "read_ns": stats["read_ns"],
            "stall_ns": stats["stall_ns"],
        }
        place = self.store.place
        if place.index is not None:  # the prediction is the device's, or a board's with everything on it
            on_device = peak_device_bytes(place.index)
            host = figures["peak_rss_bytes"] if place.is_unified else 0
            figures |= {"peak_device_bytes": on_device, "budget_peak_bytes": on_device + host}
        return figures


def folder_name(client: str) -> str:
    """A folder name for any client name: its safe characters, and a hash so that two clients never share one."""
    import hashlib

    safe = "".join(char if char.isalnum() or char in "-_" else "_" for char in client)[:40]
    return f"{safe}-{hashlib.sha256(client.encode()).hexdigest()[:12]}"
