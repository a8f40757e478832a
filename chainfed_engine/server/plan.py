"""Which stage every round trains, by method. In: configuration, depth, start layer; out: pure functions of the round.

The methods beside `chain` are baselines: no training, the classifier alone, a window fixed at the top, and those that
train all layers at once (`server.methods` has what else sets these apart).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from chainfed_engine import classifier_fit, stand_in
from chainfed_engine.config import END_TO_END, ChainConfig
from chainfed_engine.errors import ConfigError
from chainfed_engine.schedule import Schedule, num_probe_rounds
from chainfed_engine.types import Scalar, Stage, TaskKind, Window


@dataclass(frozen=True)
class Plan:
    """Raises ConfigError at once for choices that no round could keep."""

    config: ChainConfig
    num_layers: int
    task: TaskKind

    def __post_init__(self) -> None:
        if self.config.method == "chain":
            self._schedule(self.config.start_layer or 0)
        elif self.config.method == "top-window" and not 1 <= self.config.window <= self.num_layers:
            raise ConfigError(
                f"window: expected 1 to {self.num_layers} layers (the model's depth), got {self.config.window}; "
                "lower [chain] window"
            )
        if self.task != "classification" and self._trains_classifier_alone():
            raise ConfigError(
                f"linear-probe and probe_rounds: expected a classification task, got {self.task}; "
                "it has no classifier to train"
            )

    @property
    def rounds(self) -> int:
        return 0 if self.config.method == "none" else self.config.rounds

    def fixed_start_layer(self) -> int | None:
        """Lowest boundary the run trains from; None while it has yet to be chosen from profiles."""
        return {
            "chain": self.config.start_layer,
            "top-window": self.num_layers - self.config.window,
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
        """Rounds that fit the classifier in closed form."""
        return self._schedule(self.config.start_layer or 0).probe_rounds if self.config.method == "chain" else 0

    def fits_classifier(self, stage: Stage) -> bool:
        """Whether this stage fits the classifier in closed form instead of training it."""
        return stage.kind == "probe" and self.config.method == "chain"

    def classifier_settings(self, stage: Stage, shape: tuple[int, int] | None) -> dict[str, Scalar]:
        """Settings of a training task that say whether, and on how many rows, the classifier [C, D] is fitted."""
        if shape is None or not self.fits_classifier(stage):
            return {"closed_form": False}
        num_clients = self.config.clients_per_round * self._schedule(0).probe_rounds
        return {"closed_form": True, "max_rows": classifier_fit.max_rows(shape[1], shape[0], num_clients)}

    def fixes_classifier(self, architecture: str, parameters: Iterable[str]) -> bool:
        """Whether the classifier is trained at the top alone: once it was fitted, and where nothing needs it apart from
        the stand-in, as foresight does."""
        config = self.config
        wanted = config.train_classifier == "at-top" and config.foresight_every == 0
        return wanted and self.probe_rounds > 0 and stand_in.is_linear_readout(architecture, parameters)

    def stand_in_depths(self, start_layer: int) -> range:
        """Depths at which a window may end below the top: there the head needs a stand-in for what is not loaded."""
        if self.config.method != "chain" or not self.config.stand_in or self.config.foresight_every == 1:
            return range(0)
        return range(start_layer + self.config.window, self.num_layers)

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
        probe_rounds = num_probe_rounds(config.probe_rounds, config.rounds, self.task, config.aggregation)
        return Schedule(config.schedule, self.num_layers, config.window, start_layer, config.rounds, probe_rounds)

    def _trains_classifier_alone(self) -> bool:
        method = self.config.method
        return method == "linear-probe" or (method == "chain" and bool(self.config.probe_rounds))
