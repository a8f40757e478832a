"""Which stage every round trains, by method. In: configuration, depth, start layer; out: pure functions of the round.

The methods beside `chain` are baselines: no training, the classifier alone, a window fixed at the top, and those that
train all layers at once (`server.methods` has what else sets these apart).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from chainfed_engine import classifier_fit, stand_in
from chainfed_engine.config import END_TO_END, ChainConfig
from chainfed_engine.errors import ConfigError
from chainfed_engine.schedule import Schedule, num_probe_rounds, num_refit_rounds, num_window_layers, schedule_kind
from chainfed_engine.start_layer import start_layers
from chainfed_engine.types import Stage, TaskKind, Window


@dataclass(frozen=True)
class Plan:
    """`rounds_to_see_all`: after which every sample would have been seen once (None: not known).

    Raises ConfigError at once for choices that no round could keep.
    """

    config: ChainConfig
    num_layers: int
    task: TaskKind
    rounds_to_see_all: int | None = None

    def __post_init__(self) -> None:
        if self.config.method == "chain":
            self._schedule(self.config.start_layer or 0)
        elif self.config.method == "top-window" and not 1 <= self.window <= self.num_layers:
            raise ConfigError(
                f"window: expected 1 to {self.num_layers} layers (the model's depth), got {self.window}; "
                "lower [chain] window"
            )
        if self.task != "classification" and self._trains_classifier_alone():
            raise ConfigError(
                f"linear-probe, probe_rounds and refit_rounds: expected a classification task, got {self.task}; "
                "it has no classifier to train"
            )

    @property
    def window(self) -> int:
        """Layers that the chain and the top window train at once."""
        return num_window_layers(self.config.window, self.num_layers, self.config.start_layer)

    @property
    def rounds(self) -> int:
        return 0 if self.config.method == "none" else self.config.rounds

    @property
    def start_layers(self) -> range:
        """Layers that the chain may start from."""
        fixed = self.config.start_layer
        return start_layers(self.task, self.num_layers, self.window) if fixed is None else range(fixed, fixed + 1)

    def fixed_start_layer(self) -> int | None:
        """Lowest boundary the run trains from; None while it has yet to be chosen from profiles."""
        allowed = self.start_layers
        return {
            "chain": allowed.start if len(allowed) == 1 else None,
            "top-window": self.num_layers - self.window,
        }.get(self.config.method, 0 if self.config.method in END_TO_END else self.num_layers)

    def stage(self, round_id: int, start_layer: int) -> Stage:
        match self.config.method:
            case "chain":
                return self._schedule(start_layer).stage(round_id)
            case "none" | "linear-probe":
                return Stage("probe", Window(self.num_layers, self.num_layers), 0)
            case _:
                return Stage("window", Window(start_layer, self.num_layers), 0)

    @property
    def probe_rounds(self) -> int:
        """Rounds that fit the classifier in closed form, before the first window."""
        return self._schedule(self.config.start_layer or 0).probe_rounds if self.config.method == "chain" else 0

    @property
    def refit_rounds(self) -> int:
        """The same after the last window."""
        return self._schedule(self.config.start_layer or 0).refit_rounds if self.config.method == "chain" else 0

    @property
    def first_refit_round(self) -> int:
        """The round after the last window; `rounds` where nothing is refitted."""
        return self.rounds - self.refit_rounds

    def fits_classifier(self, stage: Stage) -> bool:
        """Whether this stage fits the classifier in closed form instead of training it."""
        return stage.kind == "probe" and self.config.method == "chain"

    def closed_form_index(self, round_id: int) -> tuple[int, int]:
        """Which round of its phase this one is, and the phase: 0 before the windows, 1 after them."""
        if round_id < self.probe_rounds:
            return round_id, 0
        return round_id - self.first_refit_round, 1

    def row_weight(self, round_id: int) -> float:
        """How often the rows of this closed-form round count."""
        return classifier_fit.REFIT_WEIGHT if self.closed_form_index(round_id)[1] else 1.0

    def max_rows(self, shape: tuple[int, int], clients_a_round: int) -> int:
        """Rows that one client may give to the closed form of the classifier [C, D]."""
        num_clients = clients_a_round * max(self.probe_rounds, self.refit_rounds)
        return classifier_fit.max_rows(shape[1], shape[0], num_clients)

    def train_classifier(self, architecture: str, parameters: Iterable[str]) -> Literal["never", "at-top", "always"]:
        """When windows train the classifier: as configured once it was fitted, and where nothing needs it apart from
        the stand-in, as foresight does."""
        fitted = self.probe_rounds > 0 and stand_in.is_linear_readout(architecture, parameters)
        return self.config.train_classifier if fitted and self.config.foresight_every == 0 else "always"

    def stand_in_depths(self, start_layer: int) -> range:
        """Depths at which a window may end below the top: there the head needs a stand-in for what is not loaded."""
        if self.config.method != "chain" or not self.config.uses_stand_in:
            return range(0)
        return range(start_layer + self.window, self.num_layers)

    def missing_depths(self, round_id: int, start_layer: int, fitted: Collection[int], *, at_most: int) -> range:
        """Depths to fit stand-ins for before this round: that of its window, and of windows to come; empty if it is
        fitted or not needed."""
        depths = self.stand_in_depths(start_layer)
        stop = self.stage(round_id, start_layer).window.stop
        if stop not in depths or stop in fitted:
            return range(0)
        end = next((depth for depth in range(stop, depths.stop) if depth in fitted), depths.stop)
        return range(stop, min(end, stop + at_most))

    def trained_layers(self) -> range:
        """Every layer that may be trained in some round: `initial` must hold its adapter."""
        if self.config.method in ("none", "linear-probe"):
            return range(0)
        return range(self.fixed_start_layer() or 0, self.num_layers)

    def _schedule(self, start_layer: int) -> Schedule:
        config = self.config
        probe_rounds = num_probe_rounds(
            config.probe_rounds, config.rounds, self.task, config.aggregation, self.rounds_to_see_all
        )
        refit_rounds = num_refit_rounds(config.refit_rounds, probe_rounds, config.rounds)
        kind = schedule_kind(config.schedule, self.task, self.num_layers, self.window)
        return Schedule(kind, self.num_layers, self.window, start_layer, config.rounds, probe_rounds, refit_rounds)

    def _trains_classifier_alone(self) -> bool:
        method = self.config.method
        return method == "linear-probe" or (
            method == "chain" and bool(self.config.probe_rounds or self.config.refit_rounds)
        )
