"""Callbacks in real runs: what TensorBoard and a W&B-like service get, by round."""

import builtins
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import chainfed_engine as cfe
from chainfed_engine.callbacks import Logger, TensorBoard, scalars
from chainfed_engine.errors import InvalidArgument, MemoryBudgetExceeded
from tests.conftest import Checkpoint, make_batch


class Service:
    """Like wandb: steps may not go back."""

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}
        self.last = 0

    def log(self, data: dict[str, Any], *, step: int) -> None:
        assert step >= self.last
        self.last = step
        self.logged.setdefault(step, {}).update(data)


class Seen:
    def __init__(self) -> None:
        self.events: list[Mapping[str, Any]] = []

    def on_event(self, event: Mapping[str, Any]) -> None:
        self.events.append(event)

    def kinds(self) -> list[str]:
        return [event["event"] for event in self.events]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    shape = {"model_type": "bert", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128}
    shape |= {"num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return cfe.synth(str(tmp_path / "config.json"), tmp_path / "store")


CONFIG = cfe.ChainConfig(rounds=3, sequence_length=16, batch_size=4, clients_per_round=2, adapter_size=4, eval_every=1)


def examples() -> list[dict[str, str]]:
    return [{"text": f"word {index}", "label": "ab"[index % 2]} for index in range(6)]


def test_a_service_gets_every_round_once_and_in_order(store: Path) -> None:
    service, seen = Service(), Seen()
    cfe.fit(
        store, {"anna": examples(), "ben": examples()}, CONFIG, evaluation=examples(), callbacks=[Logger(service), seen]
    )
    assert sorted(service.logged) == [0, 1, 2, 3]
    assert {"cka/layer_00", "profile/start_layer", "memory/predicted_peak_bytes"} <= service.logged[0].keys()
    for step in (1, 2, 3):
        names = service.logged[step].keys()
        assert {"train/loss", "train/window_start", "seconds/train", "traffic/bytes_up", "eval/accuracy"} <= names
        assert "memory/peak_rss_bytes" in names
    assert seen.kinds()[0] == "plan" and seen.kinds()[-1] == "end" and seen.events[-1]["error"] is None


def test_a_run_that_fails_ends_its_callbacks(store: Path) -> None:
    seen = Seen()
    with pytest.raises(MemoryBudgetExceeded):
        cfe.fit(store, {"anna": examples()}, cfe.ChainConfig(budget="1MiB", sequence_length=16), callbacks=[seen])
    assert seen.kinds() == ["end"] and "MemoryBudgetExceeded" in seen.events[0]["error"]


def test_a_trainer_of_ones_own_loop_reports_windows_and_evaluations(checkpoint: Callable[..., Checkpoint]) -> None:
    service, seen = Service(), Seen()
    batch = make_batch([9, 5, 7])
    item = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.input_ids[:, 0] % 2}
    config = cfe.ChainConfig(window=1, rounds=2, start_layer=1, adapter_size=4)
    with cfe.ChainTrainer(
        checkpoint("bert").open(), config, num_labels=2, callbacks=[Logger(service), seen]
    ) as trainer:
        while not trainer.done:
            losses = [trainer.step(item), trainer.step(item)]
            trainer.advance()
        trainer.evaluate([item])
    assert seen.kinds() == ["profile", "round", "memory", "round", "memory", "eval", "end"]
    assert seen.events[3]["window"] == [2, 3] and seen.events[3]["loss"] == pytest.approx(sum(losses) / 2)
    assert sorted(service.logged) == [0, 1, 2] and "eval/accuracy" in service.logged[2]


def test_tensorboard_reads_back_what_was_written(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfe.fit(store, {"anna": examples()}, CONFIG, evaluation=examples(), callbacks=[TensorBoard(tmp_path / "logs")])
    found = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [point.step for point in found.Scalars("train/loss")] == [1, 2, 3]
    assert all(0 <= point.value <= 1 for point in found.Scalars("eval/accuracy"))
    assert found.Scalars("memory/peak_rss_bytes")[-1].value > 1 << 20


def test_without_tensorboard_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InvalidArgument, match=r"pip install 'chainfed-engine\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_a_logger_without_log_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"log\(dict, step=\.\.\.\)"):
        Logger(object())  # type: ignore[arg-type]


def test_events_without_numbers_give_none() -> None:
    assert scalars({"event": "phase", "name": "train", "total": 3}) == {}
    assert scalars({"event": "round", "loss": None, "window": None, "clients": []})["train/clients"] == 0
