"""Rows to statements: mean and standard error, paired differences to the reference, time and bytes to its accuracy.

A *cell* is one data set with one partition; a *pair* is two runs of the same cell and seed, which share data, clients
and sampling. Differences and ratios are taken within pairs and then averaged, so that what a seed does to both cancels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chainfed_engine.study.definition import Study
from chainfed_engine.study.rows import Point, Row

Cell = tuple[str, str]
ALL: Cell = ("all", "")


@dataclass(frozen=True)
class Estimate:
    """Mean of `count` values and its standard error (None with fewer than two)."""

    mean: float
    error: float | None
    count: int


@dataclass(frozen=True)
class Reached:
    """How a method gets to the reference's final score: geometric mean of (its cost / the reference's cost) over the
    pairs that reach it, and in how many of how many pairs it does."""

    ratio: float | None
    reached: int
    pairs: int


@dataclass(frozen=True)
class Result:
    """One method in one cell, or over all cells (differences and ratios alone).

    `difference`: final score minus the reference's, in its favour when positive (token loss: the sign is turned);
    `at_equal_seconds`: the same with the last evaluation within the reference's seconds.
    """

    method: str
    cell: Cell
    score: Estimate | None
    difference: Estimate | None
    at_equal_seconds: Estimate | None
    seconds_to: Reached | None
    bytes_to: Reached | None
    seconds: Estimate | None
    megabytes: Estimate | None
    predicted_mib: float | None
    peak_mib: float | None


@dataclass(frozen=True)
class Comparison:
    study: Study
    measure: str
    cells: tuple[Cell, ...]
    results: tuple[Result, ...]  # cell by cell, methods in the study's order; `ALL` last
    num_rows: int

    def of(self, cell: Cell) -> list[Result]:
        return [result for result in self.results if result.cell == cell]


def compare(study: Study, rows: Sequence[Row]) -> Comparison:
    """Everything the table and the page say."""
    cells = tuple(dict.fromkeys(run.cell for run in study.runs))
    found = {(row.method, (row.data, row.partition), row.seed): row for row in rows}
    results = [_result(study, method, [cell], found) for cell in cells for method in study.methods]
    if len(cells) > 1:
        results += [_result(study, method, list(cells), found) for method in study.methods]
    kept = tuple(result for result in results if result is not None)
    measures = sorted({row.measure for row in rows})
    return Comparison(study, ", ".join(measures), cells, kept, len(rows))


def estimate(values: Sequence[float]) -> Estimate | None:
    """None without a value."""
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, None, 1)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(variance / len(values)), len(values))


def seconds_of(study: Study) -> Callable[[Row | Point], float]:
    """The seconds that the study compares by."""
    return (lambda each: each.cpu_seconds) if study.clock == "cpu" else (lambda each: each.seconds)


def advantage(row: Row, score: float, reference: float) -> float:
    """How much better `score` is than `reference`: accuracy up, token loss down."""
    return score - reference if row.measure == "accuracy" else reference - score


def first_reaching(row: Row, target: float) -> Point | None:
    """The first evaluation at least as good as `target`."""
    return next((point for point in row.curve if advantage(row, point.score, target) >= 0), None)


def _result(study: Study, method: str, cells: list[Cell], found: dict[tuple[str, Cell, int], Row]) -> Result | None:
    own = [row for (name, cell, _), row in found.items() if name == method and cell in cells]
    if not own:
        return None
    pairs = [
        (row, found[key])
        for row in own
        if (key := (study.reference, (row.data, row.partition), row.seed)) in found and method != study.reference
    ]
    seconds = seconds_of(study)
    one_cell = len(cells) == 1
    return Result(
        method=method,
        cell=cells[0] if one_cell else ALL,
        score=estimate([row.score for row in own]) if one_cell else None,
        difference=estimate([advantage(row, row.score, other.score) for row, other in pairs]),
        at_equal_seconds=estimate(
            [
                advantage(row, within[-1].score, other.score)
                for row, other in pairs
                if (within := [point for point in row.curve if seconds(point) <= seconds(other)])
            ]
        ),
        seconds_to=_reached(pairs, seconds),
        bytes_to=_reached(pairs, lambda point: float(point.bytes_sent)),
        seconds=estimate([seconds(row) for row in own]) if one_cell else None,
        megabytes=estimate([row.bytes_sent / 1e6 for row in own]) if one_cell else None,
        predicted_mib=max(row.predicted_peak_bytes for row in own) / 2**20 if one_cell else None,
        peak_mib=max(row.peak_rss_bytes for row in own) / 2**20 if one_cell else None,
    )


def _reached(pairs: Sequence[tuple[Row, Row]], cost: Callable[[Point], float]) -> Reached | None:
    if not pairs:
        return None
    ratios = []
    for row, other in pairs:
        point, reference = first_reaching(row, other.score), first_reaching(other, other.score)
        assert reference is not None, "a curve reaches its own last point"
        if point is not None and cost(reference) > 0:
            ratios.append(max(cost(point), 1e-9) / cost(reference))
    ratio = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
    return Reached(ratio, len(ratios), len(pairs))
