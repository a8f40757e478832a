"""Who gives which rows to the closed form of the classifier."""

from collections import Counter

import pytest

from chainfed_engine.config import ChainConfig
from chainfed_engine.server.closed_form import ClosedForm
from chainfed_engine.server.plan import Plan


def rows_by_round(config: ChainConfig, samples: dict[str, int]) -> list[dict[str, range]]:
    """Every round before the windows: client -> positions of its own order."""
    closed = ClosedForm(config, samples)
    plan = Plan(config, 4, "classification", closed.rounds_to_see_all)
    rounds = []
    for round_id in range(plan.probe_rounds):
        told = closed.settings(plan, round_id, (2, 8))
        spans = {name: (int(one["first_row"]), int(one["num_rows"])) for name, one in told.items()}
        rounds.append({name: range(first, min(first + count, samples[name])) for name, (first, count) in spans.items()})
    return rounds


def test_all_clients_give_all_their_rows_once_in_the_rounds_that_training_would_take_for_as_many() -> None:
    samples = {f"c{index}": 30 + 10 * index for index in range(8)}
    rounds = rows_by_round(ChainConfig(clients_per_round=5), samples)
    assert len(rounds) == 2
    assert len(rounds[0]) == 8, "all clients, though a round of training has five"
    assert abs(sum(map(len, rounds[0].values())) - 5 / 8 * sum(samples.values())) <= len(samples)
    seen = Counter((name, row) for one in rounds for name, rows in one.items() for row in rows)
    assert set(seen.values()) == {1} and len(seen) == sum(samples.values())


def test_many_clients_are_dealt_in_turn_and_each_gives_in_proportion_to_what_it_has() -> None:
    samples = {f"c{index:03d}": 100 if index % 2 else 50 for index in range(200)}
    config = ChainConfig(clients_per_round=20, max_local_steps=2, batch_size=16)
    rounds = rows_by_round(config, samples)
    assert [len(one) for one in rounds] == [64, 64, 64, 64]
    asked = Counter(name for one in rounds for name in one)
    assert len(asked) == 200 and set(asked.values()) == {1, 2}
    sizes = {samples[name]: len(rows) for one in rounds for name, rows in one.items()}
    assert sizes[100] == pytest.approx(2 * sizes[50], abs=1)
    visits = sum(len(rows) for one in rounds for rows in one.values())
    assert visits == pytest.approx(4 * 20 * 32, rel=0.1)


@pytest.mark.parametrize(("num_clients", "per_round"), [(50, [25, 25]), (51, [25, 26]), (200, [32, 32]), (8, [8, 8])])
def test_after_the_windows_each_client_is_asked_once_unless_that_leaves_fewer_than_train(
    num_clients: int, per_round: list[int]
) -> None:
    """With the rows that a round of training would visit, as before."""
    samples = dict.fromkeys((f"c{index:03d}" for index in range(num_clients)), 100)
    config = ChainConfig(rounds=10, clients_per_round=5, max_local_steps=2, batch_size=16)
    closed = ClosedForm(config, samples)
    plan = Plan(config, 4, "classification", closed.rounds_to_see_all)
    told = [closed.settings(plan, round_id, (2, 8)) for round_id in (8, 9)]
    assert [len(one) for one in told] == per_round
    spans = [(name, int(span["first_row"])) for one in told for name, span in one.items()]
    assert len(set(spans)) == len(spans) == sum(per_round)
    for one in told:
        assert sum(int(span["num_rows"]) for span in one.values()) == pytest.approx(5 * 32, rel=0.25)


def test_the_order_of_rows_is_another_after_the_windows_and_the_same_within_a_phase() -> None:
    config = ChainConfig(rounds=24, clients_per_round=1)
    closed = ClosedForm(config, {"a": 100, "b": 60})
    plan = Plan(config, 4, "classification", closed.rounds_to_see_all)
    told = [closed.settings(plan, round_id, (2, 8)) for round_id in (0, 1, 22, 23)]
    seeds = [one["a"]["seed"] for one in told if "a" in one]  # after the windows each is asked once
    assert len(seeds) == 3 and seeds[0] == seeds[1] != seeds[2]


def test_rounds_beyond_the_last_row_begin_again() -> None:
    config = ChainConfig(rounds=9, probe_rounds=5, clients_per_round=2)
    assert [one["b"] for one in rows_by_round(config, {"a": 4, "b": 6})] == [range(6)] * 5
