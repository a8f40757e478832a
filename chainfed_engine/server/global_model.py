"""Which of the global parameters a stage trains and which it needs. Owns them: adapters, classifier, stand-ins, and
what a method keeps for itself.

In: float32 arrays under their keys. Out: arrays and their versions, by stage; they are shared, nobody writes to them.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from chainfed_engine import classifier_fit, stand_in
from chainfed_engine.classifier_fit import FACTOR_KEY
from chainfed_engine.errors import CorruptFile, InvalidArgument
from chainfed_engine.server.parameters import Parameters
from chainfed_engine.server.statistics import refuse_factor, refuse_one_hot, refuse_sizes, row_size
from chainfed_engine.types import Arrays, Stage, TaskKind, Window, classifier_key, stand_in_key

METHOD_PREFIX = "method."  # arrays that a method keeps for itself: saved, but no part of the model
OUT_WEIGHT, OUT_BIAS = classifier_key("out_weight"), classifier_key("out_bias")


class GlobalModel:
    """`uses_later_adapters`: whether an auxiliary branch reads the adapters above the window. `train_classifier`:
    by which windows; unless "always", below the top it is sent as a part of the stand-in. `refits`: whether the
    statistics of the classifier are wanted again once the features have changed.

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
        train_classifier: Literal["never", "at-top", "always"] = "always",
        refits: bool = False,
    ) -> None:
        self._trained = Parameters(initial)
        self._stand_ins = Parameters({})
        self._factor: Arrays = {}
        self._trains_classifier = task == "classification"
        self._num_layers = num_layers
        self._uses_later_adapters = uses_later_adapters
        self._train_classifier = train_classifier
        self.is_fitted = False  # the classifier, in closed form, ever
        self._refits = refits
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

    @property
    def classifier_shape(self) -> tuple[int, int] | None:
        """[C, D] of the last linear map; None without a classifier."""
        num_labels, hidden_size = self.array(OUT_WEIGHT).shape if self._trains_classifier else (0, 0)
        return (num_labels, hidden_size) if num_labels else None

    def array(self, key: str) -> np.ndarray:
        return self._trained.select([key])[key]

    def select(self, keys: Iterable[str]) -> tuple[Arrays, dict[str, str]]:
        """Arrays and versions of these."""
        wanted = sorted(keys)
        return self._trained.select(wanted), self._trained.versions(wanted)

    def _model_keys(self) -> list[str]:
        return [key for key in self._trained.sorted_keys() if not key.startswith(METHOD_PREFIX)]

    def trained(self, stage: Stage) -> Arrays:
        """What this stage trains, and all that an update of it may hold."""
        classifier = self._trained.classifier_keys() if self.trains_classifier(stage) else []
        return self._trained.select([*self._trained.layer_keys(stage.window.layers), *classifier])

    def trains_classifier(self, stage: Stage) -> bool:
        """Whether steps of this stage train the classifier."""
        if not self._trains_classifier or self._when_trained == "never":
            return False
        return self._when_trained == "always" or stage.window.stop == self._num_layers

    @property
    def _when_trained(self) -> Literal["never", "at-top", "always"]:
        """As it was chosen for a fitted classifier; until one is, as after a fit that nobody answered, "always"."""
        return self._train_classifier if self.is_fitted else "always"

    def for_client(self, stage: Stage, max_layers: int | None) -> Stage:
        """The stage for a client that can train `max_layers` at once (None: all): the window's topmost layers. They
        end where everybody's do, so one stand-in serves all, and every position of the chain lends it another layer."""
        window = stage.window
        if stage.kind != "window" or max_layers is None or max_layers >= len(window.layers):
            return stage
        return Stage(stage.kind, Window(window.stop - max_layers, window.stop), stage.sweep)

    def adapters(self) -> tuple[Arrays, dict[str, str]]:
        """Arrays and versions of the adapters that were trained: what final features are computed with."""
        return self.select(self._trained.layer_keys(self._trained.trained_layers()))

    def needed(self, stage: Stage, start_layer: int) -> tuple[Arrays, dict[str, str]]:
        """Arrays and versions of all that the model at this stage is made of.

        An adapter that no window has reached yet is the identity and left out. One that a window has reached goes
        along even if its updates were refused: sites that share a model in memory must not see each other's.
        """
        layers = self._trained.trained_layers()
        classifier, stand_ins = self._trained.classifier_keys(), self._stand_ins
        kept: list[str] = []
        if stage.kind == "window":
            reached = stage.window.stop if stage.sweep == 0 else self._num_layers
            layers |= set(range(start_layer, reached))
            if not self._uses_later_adapters:
                layers &= set(range(stage.window.stop))
            fixed = self._fixed_classifier(stage)
            if fixed is not None:
                classifier, stand_ins = [], fixed
            prefix = stand_in_key(stage.window.stop, "")
            kept = [key for key in stand_ins.sorted_keys() if key.startswith(prefix)]
        keys = [*self._trained.layer_keys(layers), *classifier]
        arrays = {**self._trained.select(keys), **stand_ins.select(kept)}
        return arrays, {**self._trained.versions(keys), **stand_ins.versions(kept)}

    def _fixed_classifier(self, stage: Stage) -> Parameters | None:
        """Stand-in and classifier as one map, where this stage needs no more of either."""
        depth = stage.window.stop
        if self._when_trained == "always" or stage.kind != "window" or depth not in self.stand_in_depths():
            return None
        solved = self._stand_ins.select(self._stand_ins.sorted_keys())
        return Parameters(stand_in.with_classifier(solved, depth, self.array(OUT_WEIGHT), self.array(OUT_BIAS)))

    def everything(self) -> tuple[Arrays, dict[str, str]]:
        """Arrays and versions of all adapters and the classifier: the whole model, for evaluation."""
        return self.select(self._model_keys())

    def update(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Install new values of adapters, the classifier or the method's own arrays: other final features from now."""
        self._trained.replace(arrays)
        if not self._refits:
            self._factor = {}

    def refuse_factor(self, arrays: object, *, at_most: float = np.inf, halves: bool = False) -> str | None:
        """Why these are not the statistics of a closed-form classifier over `at_most` rows, or None. `halves`: whether
        they may come as float16."""
        if not isinstance(arrays, Mapping) or arrays.keys() != {FACTOR_KEY}:
            return f"classifier statistics: expected {FACTOR_KEY} alone"
        num_labels, hidden_size = self.array(OUT_WEIGHT).shape
        factor = arrays[FACTOR_KEY]
        return refuse_factor(
            FACTOR_KEY, factor, hidden_size, width=hidden_size + 1 + num_labels, at_most=at_most, halves=halves
        ) or refuse_one_hot(FACTOR_KEY, factor, hidden_size)

    def refuse_sizes(self, factors: Mapping[str, Arrays], *, limit: float) -> dict[str, str]:
        """Client -> reason for statistics whose features are out of line with the cohort's, or with those that count
        already."""
        ones = self.array(OUT_WEIGHT).shape[1]
        sizes = {client: row_size(arrays[FACTOR_KEY], ones) for client, arrays in factors.items()}
        known = row_size(self._factor[FACTOR_KEY], ones) if self._factor else None
        return refuse_sizes(sizes, FACTOR_KEY, limit=limit, known=known)

    def fit_classifier(self, statistics: list[Arrays], *, weight: float = 1.0) -> None:
        """The classifier that all rows given so far ask for, these included, in this order. `weight`: how often these
        count against those of other features; all together count as if it were 1."""
        known, parts = list(self._factor.values()), [part[FACTOR_KEY] for part in statistics]
        factor = classifier_fit.merge([*known, *parts], [1.0] * len(known) + [weight] * len(parts))
        has_bias = OUT_BIAS in self._trained.classifier_keys()
        counted = classifier_fit.weighted(factor, 1 / weight)
        self._trained.replace(classifier_fit.solve(counted, len(self.array(OUT_WEIGHT)), bias=has_bias))
        self._factor, self.is_fitted = {FACTOR_KEY: factor}, True

    def statistics(self) -> Arrays:
        """What is kept beside the parameters: stand-ins, and the classifier's factor while it is of use."""
        return {**self._stand_ins.select(self._stand_ins.sorted_keys()), **self._factor}

    def take_factor(self, saved: Arrays) -> Arrays:
        """The classifier's factor among saved arrays, {} without one. Raises CorruptFile if it cannot be one."""
        found = {key: array for key, array in saved.items() if key == FACTOR_KEY}
        if found and (reason := self.refuse_factor(found)):
            raise CorruptFile(f"saved state: {reason}; start a new run")
        return found

    def set_statistics(self, stand_ins: Mapping[str, np.ndarray], factor: Arrays, *, is_fitted: bool) -> None:
        """Exactly these, as after a restore."""
        self._stand_ins = Parameters(stand_ins)
        self._factor, self.is_fitted = factor, is_fitted

    def add_stand_ins(self, arrays: Mapping[str, np.ndarray]) -> list[str]:
        """Install fitted maps. A large one is kept only until the next comes; returns the keys let go."""
        large = stand_in.large_depths(self._stand_ins.select(self._stand_ins.sorted_keys()))
        dropped = [key for key in self._stand_ins.sorted_keys() if int(key.split(".")[1]) in large]
        self._stand_ins.remove(dropped)
        self._stand_ins.replace(arrays)
        return dropped

    def stand_in_depths(self) -> set[int]:
        """Depths whose stand-in is fitted."""
        return {int(key.split(".")[1]) for key in self._stand_ins.sorted_keys()}
