"""Which of the global parameters a stage trains and which it needs. Owns them: adapters, classifier, stand-ins.

In: float32 arrays under their keys. Out: arrays and their versions, by stage; they are shared, nobody writes to them.
"""

from collections.abc import Mapping

import numpy as np

from chainfed_engine import classifier_fit
from chainfed_engine.classifier_fit import FACTOR_KEY
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.server.checks import refuse_array
from chainfed_engine.server.parameters import Parameters
from chainfed_engine.types import Arrays, Stage, TaskKind, classifier_key, stand_in_key

OUT_WEIGHT = classifier_key("out_weight")


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
        self._classifier_factor: np.ndarray | None = None
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
        return self._trained.select(self._trained.sorted_keys())

    def trained(self, stage: Stage) -> Arrays:
        """What this stage trains, and all that an update of it may hold."""
        classifier = self._trained.classifier_keys() if self._trains_classifier else []
        return self._trained.select([*self._trained.layer_keys(stage.window.layers), *classifier])

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
        keys = self._trained.sorted_keys()
        return self._trained.select(keys), self._trained.versions(keys)

    def update(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Install new values of adapters or the classifier; the final features are others from now on."""
        self._trained.replace(arrays)
        self._classifier_factor = None

    def refuse_classifier_factor(self, arrays: Arrays) -> str | None:
        """Why these are not the statistics of a closed-form classifier, or None."""
        if not isinstance(arrays, Mapping) or arrays.keys() != {FACTOR_KEY}:
            return f"classifier statistics: expected {FACTOR_KEY} alone"
        num_labels, width = self._trained.select([OUT_WEIGHT])[OUT_WEIGHT].shape
        width += 1 + num_labels
        factor = arrays[FACTOR_KEY]
        num_rows = len(factor) if isinstance(factor, np.ndarray) and factor.ndim == 2 else 0
        return refuse_array(FACTOR_KEY, factor, shape=(min(max(num_rows, 1), width), width), dtype=np.float32)

    def fit_classifier(self, factors: list[np.ndarray]) -> None:
        """The classifier that all rows seen since the features last changed ask for, these clients' included."""
        known = [] if self._classifier_factor is None else [self._classifier_factor]
        self._classifier_factor = classifier_fit.merge([*known, *factors])
        num_labels = len(self._trained.select([OUT_WEIGHT])[OUT_WEIGHT])
        self._trained.replace(classifier_fit.solve(self._classifier_factor, num_labels))

    def statistics(self) -> Arrays:
        """What is kept beside the parameters: stand-ins, and the classifier's factor while the features stand."""
        kept = {} if self._classifier_factor is None else {FACTOR_KEY: self._classifier_factor}
        return {**self._stand_ins.select(self._stand_ins.sorted_keys()), **kept}

    def set_statistics(self, stand_ins: Mapping[str, np.ndarray], classifier_factor: np.ndarray | None) -> None:
        """Exactly these, as after a restore."""
        self._stand_ins = Parameters(stand_ins)
        self._classifier_factor = classifier_factor

    def add_stand_ins(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._stand_ins.replace(arrays)

    def stand_in_depths(self) -> set[int]:
        """Depths whose stand-in is fitted."""
        return {int(key.split(".")[1]) for key in self._stand_ins.sorted_keys()}
