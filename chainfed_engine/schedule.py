"""Where the window stands in each round: pure functions of the round number, so that a resumed run agrees.

*continuous*: the window moves up by one layer every round and wraps round at the top, so the chain is refined in
several sweeps, the last of which is whole. *train-and-freeze*: every window gets an equal share of the rounds, once,
bottom to top; where rounds are fewer than windows, the lowest get none. Either may be preceded by `probe_rounds` rounds
for the classifier alone, on the untrained model's features, and followed by `refit_rounds` rounds for it alone on the
trained ones. Source: ChainFed, section on Dynamic Layer Co-Tuning (window of Q adjacent adapters, stride one).
"""

import math
from dataclasses import dataclass
from typing import Literal

from chainfed_engine.errors import ConfigError
from chainfed_engine.start_layer import is_wide
from chainfed_engine.types import Stage, TaskKind, Window

ScheduleKind = Literal["continuous", "train-and-freeze"]
MOST_PROBE_ROUNDS = 4


def schedule_kind(chosen: ScheduleKind | Literal["auto"], task: TaskKind, num_layers: int, window: int) -> ScheduleKind:
    """As chosen; "auto": train-and-freeze for wide windows, which need no second sweep. What is frozen is neither sent
    nor run again, and the last rounds stand at the top (docs/RESULTS.md has what it is worth)."""
    if chosen != "auto":
        return chosen
    return "train-and-freeze" if is_wide(task, num_layers, window) else "continuous"


def num_window_layers(chosen: int | None, num_layers: int, start_layer: int | None = None) -> int:
    """Layers trained at once; "auto" (None): two thirds of them, no more than there are from `start_layer` on. (The
    paper sets Q by what the weakest device holds and finds more layers better, as we do: docs/RESULTS.md.)"""
    return max(1, min(2 * num_layers // 3, num_layers - (start_layer or 0))) if chosen is None else chosen


def num_probe_rounds(
    chosen: int | None, rounds: int, task: TaskKind, aggregation: str, rounds_to_see_all: int | None = None
) -> int:
    """Rounds for the classifier alone, before all others; "auto" (None): a fifth, 1 to 4, of at least three rounds, and
    no more than see every sample once; none without a classifier, and none where single clients are not trusted, for
    statistics are summed and one client's can outweigh all others."""
    if chosen is not None:
        return chosen
    if task != "classification" or aggregation != "mean" or rounds < 3:
        return 0
    most = min(MOST_PROBE_ROUNDS, max(1, rounds // 5))
    return most if rounds_to_see_all is None else max(1, min(most, rounds_to_see_all))


def num_refit_rounds(chosen: int | None, probe_rounds: int, rounds: int) -> int:
    """Rounds for the classifier alone, after all others; "auto" (None): as many as probed, and no more than a fourth of
    the rest: none for those who do not probe."""
    return min(probe_rounds, (rounds - probe_rounds) // 4) if chosen is None else chosen


def learning_rate(lr: float, decay: Literal["none", "cosine"], round_id: int, rounds: int) -> float:
    """The rate of one round. Few steps on skewed clients push the model to and fro by as much as the rate; decay lets
    that die down before the last round. Cosine: lr (1 + cos(pi round / rounds)) / 2, never zero (Loshchilov and Hutter
    2017, arXiv 1608.03983, without restarts)."""
    return lr if decay == "none" else lr * (1 + math.cos(math.pi * round_id / rounds)) / 2


@dataclass(frozen=True)
class Schedule:
    """Of `rounds` rounds the first `probe_rounds` and last `refit_rounds` fit the classifier, the others train `window`
    layers from `start_layer` (0-based) on. Raises ConfigError for a window that does not fit the model from there, and
    for more first and last rounds than there are."""

    kind: ScheduleKind
    num_layers: int
    window: int
    start_layer: int
    rounds: int
    probe_rounds: int = 0
    refit_rounds: int = 0

    def __post_init__(self) -> None:
        if self.probe_rounds + self.refit_rounds > self.rounds:
            raise ConfigError(
                f"[chain] refit_rounds: expected at most rounds ({self.rounds}) - probe_rounds ({self.probe_rounds}), "
                f"got {self.refit_rounds}; set probe_rounds too, or lower it"
            )
        if not 1 <= self.window <= self.num_layers:
            raise ConfigError(
                f"window: expected 1 to {self.num_layers} layers (the model's depth), got {self.window}; "
                "lower [chain] window"
            )
        if not 0 <= self.start_layer <= self.num_layers - self.window:
            raise ConfigError(
                f"start_layer: expected 0 to {self.num_layers - self.window} ({self.num_layers} layers less a window "
                f"of {self.window}), got {self.start_layer}; lower [chain] start_layer or window"
            )

    @property
    def num_positions(self) -> int:
        """Distinct window positions: start_layer .. num_layers - window."""
        return self.num_layers - self.window - self.start_layer + 1

    def stage(self, round_id: int) -> Stage:
        """Stage of round `round_id` (0-based)."""
        step = round_id - self.probe_rounds
        trained = self.rounds - self.probe_rounds - self.refit_rounds
        if step < 0 or step >= trained:
            return Stage("probe", Window(self.num_layers, self.num_layers), 0)
        if self.kind == "continuous":
            # The first sweep is cut short from below so that the last window stands at the top, where the loss is the
            # end-to-end loss: a run that ended lower would leave the classifier fitted to a stand-in.
            skipped = -trained % self.num_positions
            sweep, position = divmod(step + skipped, self.num_positions)
        else:
            share = max(1, trained // self.num_positions)
            lowest = max(0, self.num_positions - trained)
            sweep, position = 0, min(lowest + step // share, self.num_positions - 1)
        start = self.start_layer + position
        return Stage("window", Window(start, start + self.window), sweep)
