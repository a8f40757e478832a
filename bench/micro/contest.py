"""One kernel against its peers on one shape: turns taken in the same process, medians, one row a peer.

Our side is timed by pytest-benchmark; before each of its rounds every peer has had a turn of as many calls, in an order
that rotates, so that a busy machine slows all alike. A call too short for the clock is repeated inside a turn. With one
thread the clock is the CPU time of that thread, which other processes disturb least.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.micro import machine
from bench.micro.peers import Peer, PeerMissing, Run
from chainfed_engine import native

MIN_ROUNDS, MAX_ROUNDS = 3, 15
SHORTEST_TURN_SECONDS = 2e-3


@dataclass
class Contest:
    """m, k, n: rows, inputs and outputs of a linear; tokens, hidden size and vocabulary of a head; tokens, hidden size
    and bytes of a record of the boundary. `work`: operations or bytes of one call, in the unit of `peak` times 1e9."""

    kernel: str
    m: int
    k: int
    n: int
    ours: Run
    peers: dict[str, Peer]
    work: float
    peak: str  # a key of machine.peaks()
    call_bytes: int  # out and workspace: all the memory that a call of ours takes beside its inputs


def hold(benchmark: Any, contest: Contest, budget_seconds: float) -> list[dict[str, Any]]:
    """Time everyone; rows as in `bench.micro`, which are also left in benchmark.extra_info["rows"]."""
    runs, missing = _runs(contest)
    calls, rounds = _plan([contest.ours, *runs.values()], budget_seconds)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    turns = 0

    def peers_take_turns() -> None:
        nonlocal turns
        names = list(runs)
        for name in names[turns % len(names) :] + names[: turns % len(names)] if names else []:
            seconds[name].append(_turn(runs[name], calls))
        turns += 1

    benchmark.group = contest.kernel
    benchmark.pedantic(_turn, (contest.ours, calls), setup=peers_take_turns, rounds=rounds, warmup_rounds=1)
    ours = benchmark.stats.stats.median / calls
    common = {
        **{"kernel": contest.kernel, "m": contest.m, "k": contest.k, "n": contest.n},
        "ours_ms": _figure(ours * 1e3),
        contest.peak: _figure(contest.work / ours * 1e-9),
        "share_of_peak": _figure(contest.work / ours * 1e-9 / machine.peaks()[contest.peak]),
        "peak_bytes": contest.call_bytes + (machine.peak_growth_bytes(contest.ours) or 0),
        "rounds": rounds,
        **machine.facts(),
    }
    rows: list[dict[str, Any]] = []
    for name, run in runs.items():
        theirs = statistics.median(seconds[name][1:]) / calls  # the first belongs to our warm-up
        figures = {"ratio": _figure(theirs / ours), "peer_ms": _figure(theirs * 1e3)}
        rows.append({**common, "peer": name, **figures, "peer_peak_bytes": machine.peak_growth_bytes(run)})
    rows += [{**common, "peer": name, "ratio": None, "missing": reason} for name, reason in missing.items()]
    benchmark.extra_info["rows"] = rows
    return rows


def _runs(contest: Contest) -> tuple[dict[str, Run], dict[str, str]]:
    runs, missing = {}, {}
    for name, make in contest.peers.items():
        try:
            runs[name] = make()
        except PeerMissing as reason:
            missing[name] = str(reason)
    return runs, missing


def _plan(runs: list[Run], budget_seconds: float) -> tuple[int, int]:
    """Calls a turn and rounds such that all rounds of all contenders take about the budget."""
    for run in runs:
        run()
    once = [_turn(run, 1) for run in runs]
    calls = max(1, round(SHORTEST_TURN_SECONDS / min(once)))
    rounds = int(budget_seconds / (sum(once) * calls))
    return calls, min(max(rounds, MIN_ROUNDS), MAX_ROUNDS)


def clock() -> Callable[[], float]:
    return time.thread_time if native.num_threads() == 1 else time.perf_counter


def _turn(run: Run, calls: int) -> float:
    now = clock()
    begin = now()
    for _ in range(calls):
        run()
    return now() - begin


def _figure(value: float) -> float:
    return float(f"{value:.4g}")
