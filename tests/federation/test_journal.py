import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainfed_engine.errors import CorruptFile
from chainfed_engine.federation import LocalTransport, RunDirectory, fit
from chainfed_engine.federation.journal import Journal
from chainfed_engine.federation.messages import reply_from, reply_record, task_from, task_record
from chainfed_engine.types import Reply, Stage, Task, Window
from tests.federation.fake_site import FakeTrainer, clients, config, server_of


def _task(client: str, **fields: Any) -> Task:
    stage = Stage("window", Window(2, 4), 1)
    return Task("train", client, 3, stage, {}, {"lr": 0.1, "seed": 7, **fields}, {"x": "abc"})


def _reply(client: str, value: float = 1.0) -> Reply:
    stage = Stage("window", Window(2, 4), 1)
    return Reply("train", client, 3, 5, {"x": np.full(3, value, np.float32)}, {"loss": 0.5}, stage=stage, base="f00")


TASKS = [_task("a"), _task("b"), _task("c")]


def test_replies_received_before_a_crash_are_there_after_it_and_their_clients_are_not_asked_again(
    tmp_path: Path,
) -> None:
    assert [reply.client for reply in Journal(tmp_path, TASKS).keep([_reply("b", 2.0)])] == ["b"]
    again = Journal(tmp_path, TASKS)
    assert [task.client for task in again.missing] == ["a", "c"]
    (reply,) = again.received()
    assert (reply.client, reply.num_samples, reply.metrics, reply.round_id) == ("b", 5, {"loss": 0.5}, 3)
    assert reply.arrays["x"].tobytes() == np.full(3, 2.0, np.float32).tobytes()
    list(again.keep([_reply("a")]))
    assert len(list(Journal(tmp_path, TASKS).received())) == 2


def test_replies_to_another_exchange_are_removed(tmp_path: Path) -> None:
    list(Journal(tmp_path, TASKS).keep([_reply("a")]))
    assert len(Journal(tmp_path, [_task("a", seed=8)]).missing) == 1
    assert not list(tmp_path.iterdir())


def test_a_damaged_reply_is_asked_for_again(tmp_path: Path) -> None:
    list(Journal(tmp_path, TASKS).keep([_reply("a"), _reply("b")]))
    first = sorted(tmp_path.iterdir())[0]
    first.write_bytes(first.read_bytes()[:-2])
    assert [task.client for task in Journal(tmp_path, TASKS).missing] == ["a", "c"]


def test_errors_are_not_kept_and_odd_values_do_not_stop_the_round(tmp_path: Path) -> None:
    odd = [
        Reply("train", "a", 3, 5, error="disk full"),
        Reply("train", "b", 3, 5, {"x": [1.0]}, {"loss": 1.0}),  # type: ignore[dict-item]
        Reply("train", "b", 3, 5, {"x": np.array(["text"])}, {"loss": 1.0}),
        Reply("train", "c", 3, 5, {}, {"loss": float("nan")}),
        Reply("train", "c", 3, 5, 7, {"loss": 1.0}),  # type: ignore[arg-type]
    ]
    assert list(Journal(tmp_path, TASKS).keep(odd)) == odd
    assert not list(tmp_path.iterdir())


class _Dying(LocalTransport):
    """The server dies once so many replies were received in this round."""

    asked: list[str]
    dies_in_round, dies_after = 5, 2

    def exchange(self, tasks: Sequence[Task]) -> Iterator[Reply]:
        self.asked = [task.client for task in tasks]
        for index, reply in enumerate(super().exchange(tasks)):
            if reply.round_id == self.dies_in_round and reply.kind == "train" and index == self.dies_after:
                import os

                os._exit(9)
            yield reply


def _die(path: Path) -> None:
    transport = _Dying(clients(6, FakeTrainer()))
    with RunDirectory(path) as directory:
        fit(server_of(config(), transport), transport, None, directory)


def test_after_a_crash_in_mid_round_only_the_clients_that_had_not_answered_work_again(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    asked: list[list[str]] = []

    class Noting(LocalTransport):
        def exchange(self, tasks: Sequence[Task]) -> Iterator[Reply]:
            asked.append([task.client for task in tasks])
            return super().exchange(tasks)

    transport = Noting(clients(6, FakeTrainer()))
    with RunDirectory(tmp_path, resume=True) as directory:
        result = fit(server_of(config(), transport), transport, None, directory, resume=True)
    assert [len(names) for names in asked] == [1, 3, 3, 3, 3, 3, 3]
    whole = LocalTransport(clients(6, FakeTrainer()))
    with RunDirectory(tmp_path / "whole") as directory:
        expected = fit(server_of(config(), whole), whole, None, directory)
    assert all(result.parameters[key].tobytes() == array.tobytes() for key, array in expected.parameters.items())


def test_a_record_becomes_the_same_task_and_reply_again() -> None:
    task, reply = _task("a", flag=True, name="x"), _reply("a")
    assert task_from(task_record(task), {}) == task
    assert reply_record(reply_from(reply_record(reply), reply.arrays)) == reply_record(reply)
    assert task_from(task_record(Task("profile", "a", 0, None)), {}).stage is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "obey"),
        ("client", 5),
        ("client", "x" * 5000),
        ("round_id", -1),
        ("round_id", True),
        ("round_id", 2**60),
        ("num_samples", "many"),
        ("metrics", {"loss": float("inf")}),
        ("metrics", {"loss": "1"}),
        ("metrics", [1]),
        ("error", 3),
    ],
)
def test_a_reply_with_a_field_that_cannot_be_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(CorruptFile, match=rf"{field}|loss"):
        reply_from({**reply_record(_reply("a")), field: value}, {})


@pytest.mark.parametrize(
    "stage",
    [
        {"kind": "all", "start": 0, "stop": 1, "picked": None, "sweep": 0},
        {"kind": "window", "start": 3, "stop": 1, "picked": None, "sweep": 0},
        {"kind": "window", "start": -3, "stop": 1, "picked": None, "sweep": 0},
        {"kind": "window", "start": 0, "stop": 2**40, "picked": None, "sweep": 0},
        {"kind": "window", "start": 0, "stop": 1, "picked": [1], "sweep": 0},
        {"kind": "window", "start": 0, "stop": 9, "picked": [2, 1], "sweep": 0},
        {"kind": "window", "start": 0, "stop": 9, "picked": ["1"], "sweep": 0},
        {"kind": "window", "start": 0, "stop": 4, "picked": [1, 4], "sweep": 0},
        {"kind": "window", "start": 0, "stop": 4, "picked": [2, 1], "sweep": 0},
        {"kind": "window", "start": 0, "stop": 4, "picked": "12", "sweep": 0},
        {"kind": "window", "start": 0, "stop": 1},
        "everything",
    ],
)
def test_a_task_with_a_stage_that_cannot_be_is_refused(stage: object) -> None:
    with pytest.raises(CorruptFile, match=r"stage|window"):
        task_from({**task_record(_task("a")), "stage": stage}, {})


def test_a_record_with_fields_missing_or_too_many_is_refused() -> None:
    record = reply_record(_reply("a"))
    for bad in ({}, None, [], {**record, "more": 1}, {name: value for name, value in record.items() if name != "kind"}):
        with pytest.raises(CorruptFile, match="expected a reply with"):
            reply_from(bad, {})
