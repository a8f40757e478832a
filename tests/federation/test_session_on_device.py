"""What a session does with a device's memory: held to the budget before anything is opened, measured in every event."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import MemoryBudgetExceeded
from chainfed_engine.federation import session
from chainfed_engine.federation.session import Session, open_trainer
from chainfed_engine.model.place import CPU, Place

CONFIG = ChainConfig(budget=5 << 30, device="cuda:1")
PLAN: Any = SimpleNamespace(
    predicted_peak_bytes=3 << 30,
    smallest_budget_bytes=1 << 30,
    choices=SimpleNamespace(window=2, num_slots=None, kept_heap_bytes=0),
)


@pytest.mark.parametrize(
    ("place", "budget", "held"),
    [
        (Place(1), 5 << 30, [(1, 5 << 30)]),
        (Place(1), None, []),
        (Place(1, is_unified=True), 5 << 30, []),  # the host's share moves
        (CPU, 5 << 30, []),
    ],
)
def test_torch_is_held_to_the_budget_before_the_store_is_opened(
    monkeypatch: pytest.MonkeyPatch, place: Place, budget: int | None, held: list[tuple[int, int]]
) -> None:
    calls: list[tuple[int, int]] = []

    def refuse(*_: object, **named: Any) -> None:
        assert calls == held and named["place"] == place
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(session, "find_place", lambda text: place)
    monkeypatch.setattr(session, "hold_to_budget", lambda index, size: calls.append((index, size)))
    monkeypatch.setattr(session.LayerStore, "open", refuse)
    with pytest.raises(MemoryBudgetExceeded, match="the smallest that would do is 1073741824 bytes"):
        open_trainer(Path("store"), replace(CONFIG, budget=budget), PLAN, "classification", num_labels=2)


@pytest.mark.parametrize(
    ("method", "window", "deep"),
    [("chain", 4, False), ("chain", 5, True), ("linear-probe", 5, False), ("full-adapters", 2, True)],
)
def test_the_heap_is_told_what_it_may_keep_and_of_deep_graphs(
    monkeypatch: pytest.MonkeyPatch, method: Any, window: int, deep: bool
) -> None:
    told: list[tuple[int, bool]] = []

    def stop(*_: object, **named: Any) -> None:
        raise torch.OutOfMemoryError("enough")

    monkeypatch.setattr(session, "set_heap", lambda kept, *, deep_graphs: told.append((kept, deep_graphs)))
    monkeypatch.setattr(session.LayerStore, "open", stop)
    plan = SimpleNamespace(
        **{**vars(PLAN), "choices": SimpleNamespace(window=window, num_slots=None, kept_heap_bytes=7)}
    )
    with pytest.raises(MemoryBudgetExceeded):
        open_trainer(Path("store"), ChainConfig(method=method), plan, "classification", num_labels=2)  # type: ignore[arg-type]
    assert told == [(7, deep)]


@pytest.mark.parametrize("unified", [False, True])
def test_an_event_holds_the_devices_peak_and_what_the_budget_is_held_against(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unified: bool
) -> None:
    monkeypatch.setattr(session, "peak_device_bytes", lambda index: 7000 + index)
    counters = {"resident_bytes": 1, "bytes_read": 2, "read_ns": 3, "stall_ns": 4}
    store = SimpleNamespace(
        stats=lambda: counters, info=SimpleNamespace(path=tmp_path), place=Place(1, is_unified=unified)
    )
    figures = Session._memory(SimpleNamespace(store=store, plan=PLAN, _cache=tmp_path))  # type: ignore[arg-type]
    assert figures["peak_device_bytes"] == 7001
    assert figures["budget_peak_bytes"] == 7001 + (figures["peak_rss_bytes"] if unified else 0)
    store.place = CPU
    figures = Session._memory(SimpleNamespace(store=store, plan=PLAN, _cache=tmp_path))  # type: ignore[arg-type]
    assert "peak_device_bytes" not in figures and "budget_peak_bytes" not in figures
