"""Which of the global parameters a stage trains and which it needs. Owns them: adapters, classifier, stand-ins, and
what a method keeps for itself.

In: float32 arrays under their keys. Out: arrays and their versions, by stage; they are shared, nobody writes to them.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.server.parameters import Parameters
from chainfed_engine.types import Arrays, Stage, TaskKind, Window, stand_in_key

METHOD_PREFIX = "method."  # arrays that a method keeps for itself: saved, but no part of the model


class GlobalModel:
    """`uses_later_adapters`: whether an auxiliary branch reads the adapters above the window.

    Raises InvalidArgument when a layer of `trained_layers` has no adapter, or classification no classifier.
    """

    def __init__(
        self,
        initial: Mapping[str, np.ndarray],
        task: TaskKind,
        *,
        num_layers: int,
        trained_layers: range,
        uses_later_adapters: bool,
    ) -> None:
        self._trained = Parameters(initial)
        self._stand_ins = Parameters({})
        self._trains_classifier = task == "classification"
        self._num_layers = num_layers
        self._uses_later_adapters = uses_later_adapters
        for layer in trained_layers:
            if not self._trained.layer_keys([layer]):
                raise InvalidArgument(f"initial: expected an adapter for layer {layer}, got none")
        if self._trains_classifier and not self._trained.classifier_keys():
            raise InvalidArgument("initial: expected classifier.* arrays for a classification task, got none")

    def parameters(self) -> Arrays:
        """All adapters and the classifier."""
        return self._trained.select(self._model_keys())

    def state(self) -> Arrays:
        """These and what the method keeps beside them."""
        return self._trained.select(self._trained.sorted_keys())

    def array(self, key: str) -> np.ndarray:
        return self._trained.select([key])[key]

    def select(self, keys: Iterable[str]) -> tuple[Arrays, dict[str, str]]:
        """Arrays and versions of these."""
        wanted = sorted(keys)
        return self._trained.select(wanted), self._trained.versions(wanted)

    def _model_keys(self) -> list[str]:
        return [key for key in self._trained.sorted_keys() if not key.startswith(METHOD_PREFIX)]

    def stand_ins(self) -> Arrays:
        return self._stand_ins.select(self._stand_ins.sorted_keys())

    def trained(self, stage: Stage) -> Arrays:
        """What this stage trains, and all that an update of it may hold."""
        classifier = self._trained.classifier_keys() if self._trains_classifier else []
        return self._trained.select([*self._trained.layer_keys(stage.window.layers), *classifier])

    def for_client(self, stage: Stage, max_layers: int | None) -> Stage:
        """The stage for a client that can train `max_layers` at once (None: all): the window's topmost layers. They
        end where everybody's do, so one stand-in serves all, and every position of the chain lends it another layer."""
        window = stage.window
        if stage.kind != "window" or max_layers is None or max_layers >= len(window.layers):
            return stage
        return Stage(stage.kind, Window(window.stop - max_layers, window.stop), stage.sweep)

    def needed(self, stage: Stage | None, start_layer: int) -> tuple[Arrays, dict[str, str]]:
        """Arrays and versions of all that the model at this stage is made of; None: adapters before any training.

        An adapter that no window has reached yet is the identity and left out. One that a window has reached goes
        along even if its updates were refused: sites that share a model in memory must not see each other's.
        """
        layers = self._trained.trained_layers()
        stand_ins: list[str] = []
        if stage is not None and stage.kind == "window":
            reached = stage.window.stop if stage.sweep == 0 else self._num_layers
            layers |= set(range(start_layer, reached))
            if not self._uses_later_adapters:
                layers &= set(range(stage.window.stop))
            prefix = stand_in_key(stage.window.stop, "")
            stand_ins = [key for key in self._stand_ins.sorted_keys() if key.startswith(prefix)]
        keys = [*self._trained.layer_keys(layers), *self._trained.classifier_keys()]
        arrays = {**self._trained.select(keys), **self._stand_ins.select(stand_ins)}
        return arrays, {**self._trained.versions(keys), **self._stand_ins.versions(stand_ins)}

    def everything(self) -> tuple[Arrays, dict[str, str]]:
        """Arrays and versions of all adapters and the classifier: the whole model, for evaluation."""
        return self.select(self._model_keys())

    def known(self, versions: Mapping[str, str]) -> dict[str, str]:
        """Of what somebody says to hold, the parameters of this model; a bound on what is remembered of a claim."""
        keys = {*self._trained.sorted_keys(), *self._stand_ins.sorted_keys()}
        return {key: version for key, version in versions.items() if key in keys and len(version) <= 64}

    def update(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Install new values of adapters, the classifier or the method's own arrays."""
        self._trained.replace(arrays)

    def set_stand_ins(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Exactly these, as after a restore."""
        self._stand_ins = Parameters(arrays)

    def add_stand_ins(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._stand_ins.replace(arrays)

    def stand_in_depths(self) -> set[int]:
        """Depths whose stand-in is fitted."""
        return {int(key.split(".")[1]) for key in self._stand_ins.sorted_keys()}
