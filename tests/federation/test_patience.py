import math
from pathlib import Path

from chainfed_engine.client import Client
from chainfed_engine.federation import LocalTransport
from chainfed_engine.federation.patience import Patience
from tests.federation.fake_site import FakeTrainer, clients, config, encoded, run, server_of


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_deadline_an_exchange_waits_for_everybody() -> None:
    wait = Patience().start(2, now=Clock())
    assert wait.remaining_seconds == math.inf and not wait.is_over
    wait.answered()
    assert wait.remaining_seconds == math.inf
    wait.answered()
    assert wait.is_over


def test_a_deadline_ends_an_exchange() -> None:
    clock = Clock()
    wait = Patience(deadline_seconds=10).start(2, now=clock)
    clock.now += 9
    assert not wait.is_over and wait.remaining_seconds == 1
    clock.now += 1
    assert wait.is_over


def test_after_the_quorum_the_rest_have_the_grace_and_never_more_than_the_deadline() -> None:
    clock = Clock()
    wait = Patience(deadline_seconds=60, quorum=0.5, grace_seconds=5).start(4, now=clock)
    wait.answered()
    assert wait.remaining_seconds == 60
    clock.now += 2
    wait.answered()
    assert wait.remaining_seconds == 5
    clock.now += 4
    wait.answered()
    assert wait.remaining_seconds == 1
    late = Patience(deadline_seconds=3, quorum=0.5, grace_seconds=50).start(2, now=clock)
    late.answered()
    assert late.remaining_seconds == 3


def test_a_round_in_process_goes_on_without_those_it_has_no_time_for(tmp_path: Path) -> None:
    transport = LocalTransport(clients(6, FakeTrainer()), patience=Patience(quorum=0.5))
    server = server_of(config(clients_per_round=6, start_layer=0, stand_in=False), transport)
    summary = server.receive(transport.exchange(server.next_tasks()))
    assert len(summary.clients) == 3 and len(summary.silent) == 3 and summary.accepted


def test_clients_of_other_budgets_train_windows_of_other_sizes_in_one_round(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    small = [Client(f"small-{i}", encoded(f"small-{i}", 5), trainer, max_window=1) for i in range(2)]
    transport = LocalTransport([*clients(2, trainer), *small])
    server = server_of(config(clients_per_round=4, window=3, start_layer=0, stand_in=False, rounds=8), transport)
    while not server.done:
        tasks = server.next_tasks()
        sizes = {task.client: task.stage.window.size for task in tasks if task.stage is not None}
        assert sizes == {"client-000": 3, "client-001": 3, "small-0": 1, "small-1": 1}
        assert len(server.receive(transport.exchange(tasks)).clients) == 4


def test_a_deadline_far_away_changes_no_bit(tmp_path: Path) -> None:
    calm = run(tmp_path / "calm", config())
    watched = run(tmp_path / "watched", config(deadline_seconds=3600.0, grace_seconds=100.0))
    assert all(watched.parameters[key].tobytes() == array.tobytes() for key, array in calm.parameters.items())
