"""Where the window stands, round by round."""

import pytest

from chainfed_engine.errors import ConfigError
from chainfed_engine.schedule import (
    Schedule,
    learning_rate,
    num_probe_rounds,
    num_refit_rounds,
    num_window_layers,
    schedule_kind,
)


def starts(schedule: Schedule) -> list[int]:
    return [schedule.stage(round_id).window.start for round_id in range(schedule.rounds)]


def test_the_continuous_window_climbs_by_one_layer_and_wraps_round() -> None:
    schedule = Schedule("continuous", num_layers=6, window=2, start_layer=2, rounds=6)
    assert starts(schedule) == [2, 3, 4, 2, 3, 4]
    assert [schedule.stage(round_id).sweep for round_id in range(6)] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5, 7])
def test_the_last_round_of_a_continuous_run_stands_at_the_top(rounds: int) -> None:
    schedule = Schedule("continuous", num_layers=6, window=2, start_layer=2, rounds=rounds)
    assert schedule.stage(rounds - 1).window.stop == schedule.num_layers
    assert all(
        later - earlier in (1, -2) for earlier, later in zip(starts(schedule), starts(schedule)[1:], strict=False)
    )


def test_train_and_freeze_gives_every_window_an_equal_share_once() -> None:
    schedule = Schedule("train-and-freeze", num_layers=5, window=2, start_layer=0, rounds=9)
    assert starts(schedule) == [0, 0, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(("rounds", "expected"), [(1, [3]), (2, [2, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 3])])
def test_train_and_freeze_leaves_out_the_lowest_windows_where_rounds_are_few(rounds: int, expected: list[int]) -> None:
    schedule = Schedule("train-and-freeze", num_layers=5, window=2, start_layer=0, rounds=rounds)
    assert starts(schedule) == expected


def test_wide_windows_of_a_classifier_are_frozen_by_default_and_others_sweep() -> None:
    kinds = [schedule_kind("auto", "classification", 6, window) for window in (3, 4, 6)]
    assert kinds == ["continuous", "train-and-freeze", "train-and-freeze"]
    assert schedule_kind("auto", "causal-lm", 30, 20) == "continuous"
    assert schedule_kind("continuous", "classification", 6, 4) == "continuous"


def test_probe_rounds_come_first_and_train_no_layer() -> None:
    schedule = Schedule("continuous", num_layers=4, window=1, start_layer=3, rounds=3, probe_rounds=2)
    assert [schedule.stage(round_id).kind for round_id in range(3)] == ["probe", "probe", "window"]
    assert schedule.stage(0).window.size == 0


def test_refit_rounds_come_last_and_the_window_before_them_stands_at_the_top() -> None:
    schedule = Schedule("continuous", num_layers=6, window=2, start_layer=2, rounds=9, probe_rounds=1, refit_rounds=2)
    kinds = [schedule.stage(round_id).kind for round_id in range(9)]
    assert kinds == ["probe", *["window"] * 6, "probe", "probe"]
    assert starts(schedule)[1:7] == [2, 3, 4, 2, 3, 4]


def test_probing_by_default_ends_once_all_was_seen_and_refitting_is_no_longer() -> None:
    assert num_probe_rounds(None, 24, "classification", "mean") == 4
    assert num_probe_rounds(None, 24, "classification", "mean", rounds_to_see_all=2) == 2
    assert num_probe_rounds(3, 24, "classification", "mean", rounds_to_see_all=2) == 3
    assert [num_refit_rounds(None, probes, 24) for probes in (0, 2, 4, 20)] == [0, 2, 4, 1]
    assert num_refit_rounds(3, 0, 24) == 3


def test_more_first_and_last_rounds_than_there_are_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rounds \(4\) - probe_rounds \(1\), got 4"):
        Schedule("continuous", num_layers=4, window=1, start_layer=0, rounds=4, probe_rounds=1, refit_rounds=4)


@pytest.mark.parametrize(("window", "start", "named"), [(5, 0, "window"), (0, 0, "window"), (2, 3, "start_layer")])
def test_windows_that_do_not_fit_are_refused(window: int, start: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Schedule("continuous", num_layers=4, window=window, start_layer=start, rounds=1)


def test_the_learning_rate_falls_by_a_cosine_from_its_value_to_almost_nothing() -> None:
    rates = [learning_rate(0.5, "cosine", round_id, 8) for round_id in range(8)]
    assert rates[0] == 0.5 and rates[4] == pytest.approx(0.25)
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.02
    assert [learning_rate(0.5, "none", round_id, 8) for round_id in range(8)] == [0.5] * 8


def test_a_window_left_open_is_two_thirds_of_the_layers_and_no_more_than_the_layers_from_the_start_layer_on() -> None:
    assert [num_window_layers(None, layers) for layers in (1, 2, 6, 12, 30)] == [1, 1, 4, 8, 20]
    assert num_window_layers(None, 6, start_layer=3) == 3
    assert num_window_layers(4, 6, start_layer=3) == 4  # refused by the schedule, not changed
