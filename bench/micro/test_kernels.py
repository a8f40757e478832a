"""Every kernel against its peers, a test a shape. A contest that cannot be built names what is missing and is skipped.
Ratios are reported, not asserted: a shared machine must not fail a build."""

from collections.abc import Callable
from typing import Any

import pytest

from bench.micro.cases import Case, build
from bench.micro.contest import hold
from bench.micro.real_text import TextMissing

FULL_SECONDS, QUICK_SECONDS = 4.0, 0.6


def test_kernel(case: Case, benchmark: Any, report: Callable[[Any], None], request: pytest.FixtureRequest) -> None:
    try:
        contest = build(case)
    except TextMissing as missing:
        pytest.skip(f"{case.kernel}: {missing}")
    usual = QUICK_SECONDS if request.config.getoption("quick") else FULL_SECONDS
    rows = hold(benchmark, contest, request.config.getoption("seconds") or usual)
    report(rows)
    assert {row["peer"] for row in rows} == set(contest.peers)
