"""Means, standard errors, paired differences, costs to the reference's score: checked by hand on made-up rows."""

import json
import math
from pathlib import Path

import pytest

from chainfed_engine.study import Study, compare, load_study
from chainfed_engine.study.compare import ALL, estimate
from chainfed_engine.study.page import mean_curve, render
from chainfed_engine.study.rows import Point, Row, parse_row, row_line
from chainfed_engine.study.table import markdown


def row(study: Study, method: str, data: str, partition: str, seed: int, scores: list[float], second: float) -> Row:
    """One evaluation a round; every round costs `second` seconds and as many megabytes."""
    curve = tuple(
        Point(number, score, number * second, number * second * 0.5, round(number * second * 1e6))
        for number, score in enumerate(scores, 1)
    )
    last = curve[-1]
    return Row(
        f"{method}-{data}-{partition}-{seed}", method, data, partition, seed, "accuracy", last.score, last.rounds,
        10, last.seconds, last.cpu_seconds, last.bytes_sent, 300 << 20, 200 << 20, 0, 1, curve, "1",
    )  # fmt: skip


@pytest.fixture
def study(folder: Path) -> Study:
    return load_study(folder / "study.toml")


def rows(study: Study) -> list[Row]:
    whole = "everything at once"
    return [
        row(study, "chain", "films", "even", 0, [0.7, 0.8, 0.9], 1.0),
        row(study, "chain", "films", "even", 1, [0.5, 0.7, 0.8], 1.0),
        row(study, whole, "films", "even", 0, [0.6, 0.8], 4.0),
        row(study, whole, "films", "even", 1, [0.7, 0.9], 4.0),
        row(study, "chain", "films", "skewed", 0, [0.6], 1.0),
    ]


def test_scores_differences_and_costs_are_those_of_the_pairs(study: Study) -> None:
    comparison = compare(study, rows(study))
    chain, whole = comparison.of(("films", "even"))
    assert chain.score is not None and chain.score.mean == pytest.approx(0.85)
    assert chain.score.error == pytest.approx(0.05)
    assert chain.difference is not None and chain.difference.mean == pytest.approx((0.1 - 0.1) / 2)
    assert chain.difference.error == pytest.approx(0.1)
    assert chain.seconds_to is not None
    assert (chain.seconds_to.reached, chain.seconds_to.pairs) == (1, 2), "seed 1 never reaches 0.9"
    assert chain.seconds_to.ratio == pytest.approx(2.0 / 8.0), (
        "0.8 after two of its rounds, eight seconds for the other"
    )
    assert chain.bytes_to is not None and chain.bytes_to.ratio == pytest.approx(0.25)
    assert whole.difference is None, "the reference is not compared with itself"
    assert chain.peak_mib == 200 and chain.predicted_mib == 300


def test_at_equal_seconds_the_last_evaluation_within_the_references_time_counts(study: Study) -> None:
    slow = [
        row(study, "chain", "films", "even", 0, [0.6, 0.7, 0.95], 3.0),
        row(study, "everything at once", "films", "even", 0, [0.8], 7.0),
    ]
    (chain, _) = compare(study, slow).of(("films", "even"))
    assert chain.at_equal_seconds is not None and chain.at_equal_seconds.mean == pytest.approx(0.7 - 0.8)
    assert chain.difference is not None and chain.difference.error is None, "one pair has no error"


def test_a_cell_without_the_reference_has_scores_but_no_differences(study: Study) -> None:
    (chain,) = compare(study, rows(study)).of(("films", "skewed"))
    assert chain.score is not None and chain.difference is None and chain.seconds_to is None


def test_over_all_cells_there_are_differences_but_no_scores(study: Study) -> None:
    chain = next(result for result in compare(study, rows(study)).of(ALL) if result.method == "chain")
    assert chain.score is None and chain.difference is not None and chain.difference.count == 2


def test_the_processors_clock_is_taken_where_the_study_says_so(folder: Path) -> None:
    study = load_study(folder / "study.toml", ["study.clock=cpu"])
    (chain, _) = compare(study, rows(study)).of(("films", "even"))
    assert chain.seconds is not None and chain.seconds.mean == pytest.approx(1.5)


def test_a_lower_token_loss_is_an_advantage(study: Study) -> None:
    from dataclasses import replace

    turned = [replace(each, measure="token_loss") for each in rows(study)[:3:2]]
    (chain, _) = compare(study, turned).of(("films", "even"))
    assert chain.difference is not None and chain.difference.mean == pytest.approx(0.8 - 0.9)


def test_an_estimate_is_mean_and_standard_error() -> None:
    three = estimate([1.0, 2.0, 6.0])
    assert three is not None and three.mean == 3.0
    assert three.error == pytest.approx(math.sqrt(7.0 / 3.0))
    assert estimate([]) is None


def test_a_row_reads_back_equal(study: Study) -> None:
    for each in rows(study):
        assert parse_row(row_line(each), "here") == each


def test_table_and_page_say_what_the_comparison_says(study: Study) -> None:
    made = rows(study)
    comparison = compare(study, made)
    table = markdown(comparison)
    assert "| chain | 0.8500 ± 0.0500 | +0.0000 ± 0.1000 |" in table and "0.25x (1 of 2)" in table
    page = render(study, made, comparison)
    assert page.count("<svg viewBox") >= 3 and "0.25x (1 of 2)" in page and "stroke-dasharray" in page
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")


def test_a_mean_curve_has_the_rounds_that_every_run_has(study: Study) -> None:
    three = row(study, "chain", "films", "even", 0, [0.1, 0.2, 0.3], 1.0)
    two = row(study, "chain", "films", "even", 1, [0.3, 0.4], 1.0)
    assert [(point.rounds, point.score) for point in mean_curve([three, two])] == [
        (1, pytest.approx(0.2)),
        (2, pytest.approx(0.3)),
    ]


def test_no_two_methods_of_a_chart_look_alike(folder: Path) -> None:
    methods = ["none", "chain", "lora", "fedra", "flora", "fwdllm", "fedkseed", "linear-probe", "top-window"]
    chosen = json.dumps([*methods, "full-adapters"])
    study = load_study(folder / "study.toml", [f"study.methods={chosen}", "study.reference=none"])
    made = [row(study, method, "films", "even", 0, [0.1, 0.2], 1.0) for method in study.methods]
    page = render(study, made, compare(study, made))
    charts = page.split("<h3>")[1:]
    assert len(charts) == 6, (
        "three charts for seven methods and the reference, three for the other two and the reference"
    )
    for chart in charts:
        dashes = [line.split('"')[0] for line in chart.split("<ul")[0].split('stroke-dasharray="')[1:]]
        assert len(set(dashes)) == len(dashes) >= 3
