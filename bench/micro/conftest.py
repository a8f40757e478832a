"""Options and output of the kernel benchmarks; `python -m bench.micro` is the usual way in."""

import json
import sys
import time
from typing import Any

import pytest
import torch

from bench.micro import machine
from bench.micro.cases import KERNELS, cases
from bench.micro.table import table
from chainfed_engine import native

ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels")
    group.addoption("--quick", action="store_true", help="few shapes, few rounds: a minute instead of many")
    group.addoption("--seconds", type=float, help="for all rounds of a contest (default: 4, quick: 0.6)")
    group.addoption("--threads", type=int, help="of torch and of ours (default: all cores)")
    group.addoption("--kernels", default=",".join(KERNELS), help="which of them, separated by commas")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    wanted = metafunc.config.getoption("kernels").split(",")
    if unknown := set(wanted) - set(KERNELS):
        raise pytest.UsageError(
            f"--kernels: no kernel named {', '.join(sorted(unknown))}; there are {', '.join(KERNELS)}"
        )
    chosen = [case for case in cases(metafunc.config.getoption("quick")) if case.kernel in wanted]
    metafunc.parametrize("case", chosen, ids=lambda case: "-".join(map(str, case)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # pytest-benchmark takes its timer from a marker; contest.clock() is the same choice for the peers.
    if config.getoption("threads") == 1:
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=time.thread_time))


@pytest.fixture(scope="session", autouse=True)
def threads(request: pytest.FixtureRequest) -> int:
    count: int = request.config.getoption("threads") or torch.get_num_threads()
    torch.set_num_threads(count)
    native.set_num_threads(count)
    machine.keep_pages()
    print(json.dumps({"peaks": machine.peaks(), **machine.facts()}), file=sys.__stdout__, flush=True)
    return count


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Any:
    """report(rows): one JSON line each, as they come; kept for the table."""

    def keep(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            print(json.dumps(row), file=sys.__stdout__, flush=True)
        ROWS.extend(rows)

    return keep


def pytest_unconfigure(config: pytest.Config) -> None:
    if ROWS:
        print(table(ROWS), file=sys.__stdout__, flush=True)
        ROWS.clear()
