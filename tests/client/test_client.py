import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainfed_engine.client import Client
from chainfed_engine.client.held import HeldParameters
from chainfed_engine.data import EncodedData
from chainfed_engine.errors import ChainfedError, DataError, MemoryBudgetExceeded
from chainfed_engine.types import Arrays, Batch, Scalar, Stage, Task, Window

KEY = "adapters.1.up_weight"
STAGE = Stage("window", Window(1, 3), 0)
SETTINGS = {"lr": 0.1, "batch_size": 4, "local_epochs": 2, "max_local_steps": 0, "seed": 11, "start_layer": 1}


class RecordingTrainer:
    """Writes down what a client asks of it; its loss is the number of steps so far."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.batches: list[Batch] = []
        self.prepared: list[Batch] = []
        self.arrays: Arrays = {}
        self.buffer = np.zeros(3, np.float32)
        self.failure: Exception | None = None

    def begin(
        self,
        stage: Stage,
        arrays: Arrays,
        *,
        cache_dir: Path | None,
        lr: float,
        settings: Mapping[str, Scalar] | None = None,
    ) -> None:
        assert (stage, lr, (settings or {})["start_layer"]) == (STAGE, 0.1, 1)
        self.calls.append("begin")
        self.arrays = arrays

    def prepare(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        self.calls.append("prepare")
        self.prepared = list(batches)
        return {"prefix_layers_run": 1.0}

    def step(self, batch: Batch) -> float:
        if self.failure is not None:
            raise self.failure
        self.calls.append("step")
        self.batches.append(batch)
        return float(len(self.batches))

    def trained(self) -> Arrays:
        return {KEY: self.buffer}

    def end(self) -> None:
        self.calls.append("end")

    def profile(
        self,
        batches: Sequence[Batch],
        arrays: Arrays,
        *,
        depths: Collection[int] = (),
        max_rows: int | None = None,
        with_scores: bool = True,
    ) -> Arrays:
        self.batches = list(batches)
        return {
            "cka": np.full(4, float(with_scores)),
            "depths": np.array(sorted(depths)),
            "max_rows": np.array(max_rows),
            "stand_in.1.factor": np.ones((1, 9), np.float32),
        }

    def classifier_statistics(self, batches: Iterable[Batch], arrays: Arrays) -> tuple[Arrays, float]:
        self.batches = list(batches)
        return {"classifier.factor": np.ones((1, 1), np.float32)}, 0.5

    def evaluate(self, batches: Iterable[Batch], arrays: Arrays) -> Mapping[str, float]:
        return {"accuracy": 0.5, "num_samples": float(sum(len(batch.sample_ids) for batch in batches))}


def _data(num_samples: int) -> EncodedData:
    lengths = np.random.default_rng(0).integers(1, 9, size=num_samples)
    return EncodedData(
        input_ids=[np.arange(length, dtype=np.int32) for length in lengths],
        labels=np.zeros(num_samples, np.int64),
        sample_ids=[f"sample-{index}" for index in range(num_samples)],
        rows=np.arange(num_samples, dtype=np.int64),
    )


def _client(trainer: RecordingTrainer, num_samples: int = 10, **fields: Any) -> Client:
    return Client("a", _data(num_samples), trainer, **fields)


def _task(kind: str = "train", **fields: Any) -> Task:
    settings = {**SETTINGS, **fields.pop("settings", {})}
    given: dict[str, Any] = {
        "arrays": {KEY: np.ones(3, np.float32)},
        "versions": {KEY: "v1"},
        "stage": STAGE,
        **fields,
    }
    return Task(kind, "a", 4, settings=settings, **given)  # type: ignore[arg-type]


def _ids(batches: Iterable[Batch]) -> list[list[str]]:
    return [batch.sample_ids for batch in batches]


def test_training_fills_the_cache_then_steps_through_every_epoch_then_closes() -> None:
    trainer = RecordingTrainer()
    reply = _client(trainer).handle(_task())
    assert trainer.calls == ["begin", "prepare", *["step"] * 6, "end"]
    assert (reply.kind, reply.client, reply.round_id, reply.num_samples, reply.error) == ("train", "a", 4, 10, None)
    seen = [name for names in _ids(trainer.batches) for name in names]
    assert len(seen) == 20 and len(set(seen)) == 10
    assert reply.metrics["steps"] == 6
    assert reply.metrics["prefix_layers_run"] == 1
    weights = [4, 4, 2, 4, 4, 2]
    assert reply.metrics["loss"] == pytest.approx(np.average([1, 2, 3, 4, 5, 6], weights=weights))


def test_the_order_of_training_follows_the_seed_and_the_order_of_filling_never_changes() -> None:
    orders, fills = [], []
    for seed in (11, 11, 12):
        trainer = RecordingTrainer()
        _client(trainer).handle(_task(settings={"seed": seed}))
        orders.append(_ids(trainer.batches))
        fills.append(_ids(trainer.prepared))
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:3] != orders[0][3:], "epochs are shuffled apart"
    assert fills[0] == fills[1] == fills[2]


@pytest.mark.parametrize(("limit", "steps"), [(1, 1), (4, 4), (6, 6), (99, 6), (0, 6)])
def test_the_number_of_local_steps_is_limited_across_epochs(limit: int, steps: int) -> None:
    trainer = RecordingTrainer()
    assert _client(trainer).handle(_task(settings={"max_local_steps": limit})).metrics["steps"] == steps


def test_a_limited_round_fills_the_cache_with_no_more_than_it_trains_on_in_groups_that_never_change() -> None:
    whole, seen = RecordingTrainer(), set()
    _client(whole, 30).handle(_task())
    for seed in range(12):
        trainer = RecordingTrainer()
        _client(trainer, 30).handle(_task(settings={"max_local_steps": 2, "seed": seed}))
        assert all(group in _ids(whole.prepared) for group in _ids(trainer.prepared))
        prepared = {name for names in _ids(trainer.prepared) for name in names}
        assert prepared == {name for names in _ids(trainer.batches) for name in names} and len(trainer.batches) == 2
        seen |= prepared
    assert len(seen) == 30, "every sample has its turn"


def test_fewer_samples_than_a_batch_make_one_smaller_batch() -> None:
    trainer = RecordingTrainer()
    reply = _client(trainer, 1).handle(_task(settings={"local_epochs": 1}))
    assert reply.num_samples == 1 and _ids(trainer.batches) == [["sample-0"]]


def test_a_client_without_samples_is_refused() -> None:
    with pytest.raises(DataError, match="client a"):
        _client(RecordingTrainer(), 0)


def test_an_update_is_a_copy_of_the_trainers_buffers() -> None:
    trainer = RecordingTrainer()
    reply = _client(trainer).handle(_task())
    trainer.buffer += 1
    assert (reply.arrays[KEY] == 0).all()


@pytest.mark.parametrize("failure", [MemoryBudgetExceeded("needs 9 bytes\nhas 8"), ChainfedError("no")])
def test_errors_of_the_engine_become_one_line_in_the_reply(failure: Exception) -> None:
    trainer = RecordingTrainer()
    trainer.failure = failure
    reply = _client(trainer).handle(_task())
    assert reply.error is not None and reply.error.startswith(type(failure).__name__) and "\n" not in reply.error
    assert reply.arrays == {}
    assert trainer.calls[-1] == "end"


def test_a_bug_keeps_its_traceback_and_still_closes_the_cache() -> None:
    trainer = RecordingTrainer()
    trainer.failure = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        _client(trainer).handle(_task())
    assert trainer.calls[-1] == "end"


def test_a_loss_that_is_not_finite_ends_the_task() -> None:
    class Diverging(RecordingTrainer):
        def step(self, batch: Batch) -> float:
            return float("nan")

    reply = _client(Diverging()).handle(_task())
    assert reply.error is not None and "NonFiniteLoss" in reply.error


def test_a_client_keeps_what_it_was_sent_and_uses_exactly_what_the_task_names() -> None:
    trainer = RecordingTrainer()
    client = _client(trainer)
    client.handle(_task())
    client.handle(
        _task(arrays={"adapters.2.up_bias": np.zeros(2, np.float32)}, versions={KEY: "v1", "adapters.2.up_bias": "w"})
    )
    assert trainer.arrays.keys() == {KEY, "adapters.2.up_bias"}
    client.handle(_task(arrays={}, versions={"adapters.2.up_bias": "w"}))
    assert trainer.arrays.keys() == {"adapters.2.up_bias"}


@pytest.mark.parametrize("versions", [{KEY: "v2"}, {KEY: "v1", "adapters.9.up_bias": "v1"}])
def test_a_client_that_lacks_a_parameter_says_so(versions: dict[str, str]) -> None:
    client = _client(RecordingTrainer())
    client.handle(_task())
    reply = client.handle(_task(arrays={}, versions=versions))
    assert reply.error is not None and "missing here" in reply.error


def test_profiling_uses_the_batches_and_depths_asked_for() -> None:
    trainer = RecordingTrainer()
    task = _task(
        "profile",
        stage=None,
        settings={"num_batches": 2, "depth_start": 1, "depth_stop": 3, "max_rows": 9, "with_scores": 0},
    )
    reply = _client(trainer).handle(task)
    assert reply.kind == "profile" and len(trainer.batches) == 2
    assert reply.arrays["depths"].tolist() == [1, 2] and reply.arrays["max_rows"] == 9
    assert not reply.arrays["cka"].any()


@pytest.mark.parametrize(("travels", "dtype"), [("f32", np.float32), ("int8", np.float16)])
def test_statistics_go_up_in_sixteen_bits_where_that_was_asked_for(travels: str, dtype: type) -> None:
    client = _client(RecordingTrainer())
    closed_form = {"closed_form": True, "first_row": 0, "num_rows": 3, "update_format": travels}
    assert client.handle(_task(settings=closed_form)).arrays["classifier.factor"].dtype == dtype
    asked = {"num_batches": 2, "depth_start": 1, "depth_stop": 3, "max_rows": 9, "with_scores": 1}
    profile = client.handle(_task("profile", stage=None, settings={**asked, "update_format": travels})).arrays
    assert profile["stand_in.1.factor"].dtype == dtype and profile["cka"].dtype == np.float64


def test_evaluation_sees_every_sample_once() -> None:
    reply = _client(RecordingTrainer()).handle(_task("evaluate", stage=None))
    assert reply.metrics == {"accuracy": 0.5, "num_samples": 10.0}


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 0), ("batch_size", "4"), ("local_epochs", 0), ("lr", float("inf")), ("seed", -1), ("seed", True)],
)
def test_a_setting_that_cannot_be_is_an_error_reply(field: str, value: object) -> None:
    assert _client(RecordingTrainer()).handle(_task(settings={field: value})).error is not None


def test_a_task_for_someone_else_or_of_no_kind_is_an_error_reply() -> None:
    client = _client(RecordingTrainer())
    assert client.handle(dataclasses.replace(_task(), client="b")).error is not None
    assert client.handle(_task("dance")).error is not None
    assert client.handle(_task(stage=None)).error is not None


def test_statistics_of_the_classifier_take_the_samples_asked_for_and_none_twice() -> None:
    trainer = RecordingTrainer()
    client, seen = _client(trainer), []
    for first in range(0, client.num_samples, 3):
        reply = client.handle(_task(settings={"closed_form": True, "first_row": first, "num_rows": 3}))
        assert reply.error is None and reply.metrics["loss"] == 0.5 and reply.arrays.keys() == {"classifier.factor"}
        names = [name for batch in trainer.batches for name in batch.sample_ids]
        assert len(names) == min(3, client.num_samples - first)
        seen += names
    assert len(set(seen)) == len(seen) == client.num_samples
    beyond = client.handle(_task(settings={"closed_form": True, "first_row": 10**6, "num_rows": 3}))
    assert beyond.error is not None and "1000000" in beyond.error


def test_a_task_that_brings_nothing_is_done_by_a_client_that_has_no_folder_yet(tmp_path: Path) -> None:
    held = HeldParameters(tmp_path / "held")
    assert held.take(Task("profile", "a", 0, None, {}, {}, {}, "")) == {}
    assert held.versions == {} and not (tmp_path / "held").exists()
