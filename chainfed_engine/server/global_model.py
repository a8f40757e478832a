"""Which of the global parameters a stage trains and which it needs. Owns them: adapters, classifier, stand-ins.

In: float32 arrays under their keys. Out: read-only arrays and their versions, by stage. No schedule, no clients.
"""

from collections.abc import Mapping

import numpy as np

from chainfed_engine.errors import InvalidArgument
from chainfed_engine.server.parameters import Parameters
from chainfed_engine.types import Arrays, Stage, TaskKind, stand_in_key


class GlobalModel:
    """`uses_later_adapters`: whether an auxiliary branch reads the adapters above the window.

    Raises InvalidArgument when a layer of `trained_layers` has no adapter, or classification no classifier.
    """

    def __init__(
        self,
        initial: Mapping[str, np.ndarray],
        task: TaskKind,
        *,
        trained_layers: range,
        uses_later_adapters: bool,
    ) -> None:
        self._trained = Parameters(initial)
        self._stand_ins = Parameters({})
        self._trains_classifier = task == "classification"
        self._uses_later_adapters = uses_later_adapters
        for layer in trained_layers:
            if not self._trained.layer_keys([layer]):
                raise InvalidArgument(f"initial: expected an adapter for layer {layer}, got none")
        if self._trains_classifier and not self._trained.classifier_keys():
            raise InvalidArgument("initial: expected classifier.* arrays for a classification task, got none")

    def parameters(self) -> Arrays:
        """All adapters and the classifier."""
        return self._trained.select(self._trained.sorted_keys())

    def stand_ins(self) -> Arrays:
        return self._stand_ins.select(self._stand_ins.sorted_keys())

    def trained(self, stage: Stage) -> Arrays:
        """What this stage trains, and all that an update of it may hold."""
        classifier = self._trained.classifier_keys() if self._trains_classifier else []
        return self._trained.select([*self._trained.layer_keys(stage.window.layers), *classifier])

    def needed(self, stage: Stage | None) -> tuple[Arrays, dict[str, str]]:
        """Arrays and versions of all that the model at this stage is made of; None: the whole model.

        Untrained adapters (the identity) are left out unless they are about to be trained.
        """
        layers = self._trained.trained_layers()
        stand_ins: list[str] = []
        if stage is not None:
            if not self._uses_later_adapters:
                layers = {layer for layer in layers if layer < stage.window.stop}
            layers |= set(stage.window.layers)
            prefix = stand_in_key(stage.window.stop, "")
            stand_ins = [key for key in self._stand_ins.sorted_keys() if key.startswith(prefix)]
        keys = [*self._trained.layer_keys(layers), *self._trained.classifier_keys()]
        arrays = {**self._trained.select(keys), **self._stand_ins.select(stand_ins)}
        return arrays, {**self._trained.versions(keys), **self._stand_ins.versions(stand_ins)}

    def update(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Install new values of adapters or the classifier."""
        self._trained.replace(arrays)

    def set_stand_ins(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._stand_ins = Parameters(arrays)
