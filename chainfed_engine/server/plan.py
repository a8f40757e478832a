"""Which stage every round trains, by method. In: configuration, depth, start layer; out: pure functions of the round.

The methods beside `chain` are the baselines that need no other machinery: no training, the classifier alone, a
window fixed at the top, all adapters at once.
"""

from dataclasses import dataclass

from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import ConfigError
from chainfed_engine.schedule import Schedule
from chainfed_engine.types import Stage, TaskKind, Window


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

    @property
    def needs_profile(self) -> bool:
        """Whether clients must be asked for statistics first: the start layer or the stand-ins depend on them."""
        return self.config.method == "chain" and (self.config.start_layer is None or bool(self.stand_in_depths(None)))

    def fixed_start_layer(self) -> int | None:
        """Lowest boundary the run trains from; None while it has yet to be chosen from profiles."""
        return {
            "chain": self.config.start_layer,
            "top-window": self.num_layers - self.config.window,
            "full-adapters": 0,
        }.get(self.config.method, self.num_layers)

    def stage(self, round_id: int, start_layer: int) -> Stage:
        match self.config.method:
            case "chain":
                return self._schedule(start_layer).stage(round_id)
            case "top-window" | "full-adapters":
                return Stage("window", Window(start_layer, self.num_layers), 0)
            case _:
                return Stage("probe", Window(self.num_layers, self.num_layers), 0)

    def stand_in_depths(self, start_layer: int | None) -> range:
        """Depths at which a window may end below the top: there the head needs a stand-in for what is not loaded.

        `start_layer` None: not chosen yet, so every depth it could ask for.
        """
        if self.config.method != "chain" or not self.config.stand_in:
            return range(0)
        first = self.config.start_layer if start_layer is None else start_layer
        return range((first or 0) + self.config.window, self.num_layers)

    def trained_layers(self) -> range:
        """Every layer that may be trained in some round: `initial` must hold its adapter."""
        if self.config.method in ("none", "linear-probe"):
            return range(0)
        return range(self.fixed_start_layer() or 0, self.num_layers)

    def _schedule(self, start_layer: int) -> Schedule:
        config = self.config
        return Schedule(
            config.schedule, self.num_layers, config.window, start_layer, config.rounds, config.probe_rounds
        )

    def _trains_classifier_alone(self) -> bool:
        method = self.config.method
        return method == "linear-probe" or (method == "chain" and self.config.probe_rounds > 0)
