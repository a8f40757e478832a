"""What clients measured on the model as it stands becomes the start layer and the stand-ins.

In: profile replies one by one; out: start layer, stand-in arrays. Statistics are large (for every depth up to
2D + 1 rows of 2D + 1 numbers), so they are asked for a few depths at a time, and replies are merged as they come: as
soon as every client before it in name order has been dealt with. That order, not the order of arrival, fixes the sums.
The first of a cohort wait until there are enough to tell who is out of line; the others are held against those before.
Source: ChainFed, section on Function-Oriented Adaptive Tuning, for the scores.
"""

from collections.abc import Mapping

import numpy as np

from chainfed_engine import stand_in
from chainfed_engine.server.checks import refuse_array, refuse_envelope
from chainfed_engine.server.quarantine import MIN_COHORT
from chainfed_engine.server.statistics import refuse_factor, refuse_size, row_size
from chainfed_engine.start_layer import choose_start_layer
from chainfed_engine.types import Arrays, ModelShape, Reply, Task, stand_in_key

SCORES_KEY = "cka"  # float64 [num_layers]


class ProfileCollector:
    """`tasks`: who was asked. `depths`: where stand-in statistics are due. `with_scores`: whether scores are.

    `max_weight`: what a client's samples weigh at most. `norm_limit`: times the cohort's median that the rows behind
    statistics may measure. `halves`: whether statistics may come as float16. The first reply of a client counts.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        *,
        shape: ModelShape,
        depths: range,
        samples: Mapping[str, int],
        with_scores: bool,
        max_weight: int | None = None,
        norm_limit: float = 0.0,
        halves: bool = False,
    ) -> None:
        self._tasks = tasks
        self._shape = shape
        self._factor_keys = [stand_in_key(depth, "factor") for depth in depths]
        self._samples = samples
        self._with_scores = with_scores
        self._max_weight, self._norm_limit, self._halves = max_weight, norm_limit, halves
        self._held: list[Reply] = []  # until there is a cohort
        self._sizes: dict[str, list[float]] = {key: [] for key in self._factor_keys}
        self._out_of_line: dict[str, str] = {}
        self._waiting: dict[str, Reply | None] = {}  # arrived (None: refused) before someone ahead in name order
        self._order = sorted(tasks)
        self._weighted_scores = np.zeros(shape.num_layers, np.float64)
        self._factors: Arrays = {}
        self.counted: list[str] = []
        self.total_samples = 0

    def add(self, reply: Reply) -> str | None:
        """Take one reply of a client that was asked; the reason if it is refused. A refused one may not try again."""
        client = reply.client
        if client in self._waiting or client not in self._order:
            return "more than one reply; the first one counts"
        reason = self._refuse(reply)
        self._waiting[client] = None if reason else reply
        while self._order and self._order[0] in self._waiting:
            self._compare(self._waiting.pop(self._order.pop(0)))
        return reason

    def finish(self) -> dict[str, str]:
        """No more replies will come: merge those that waited for a client that never answered. Client -> reason for
        those that were out of line with the cohort."""
        for client in self._order:
            self._compare(self._waiting.pop(client, None))
        self._order = []
        self._merge_held()
        return self._out_of_line

    @property
    def scores(self) -> np.ndarray:
        """Mean CKA by layer, weighted by samples: float64 [num_layers]; empty if none were asked for."""
        if not self._with_scores:
            return np.empty(0)
        return np.asarray(self._weighted_scores / self.total_samples)

    def start_layer(self, threshold: float, allowed: range) -> int:
        return choose_start_layer(self.scores, threshold=threshold, allowed=allowed)

    def stand_ins(self, *, ridge: float | None) -> Arrays:
        """The solved maps at the depths asked for; their statistics are dropped."""
        solved: Arrays = {}
        for key in self._factor_keys:
            solved.update(stand_in.solve({key: self._factors.pop(key)}, ridge=ridge))
        return solved

    def _refuse(self, reply: Reply) -> str | None:
        reason = refuse_envelope(reply, self._tasks[reply.client], max_samples=self._samples[reply.client])
        if reason is not None:
            return reason
        scores = [SCORES_KEY] if self._with_scores else []
        if not isinstance(reply.arrays, Mapping) or reply.arrays.keys() != {*scores, *self._factor_keys}:
            return f"profile: expected {len(scores)} of {SCORES_KEY} and statistics at {len(self._factor_keys)} depths"
        for key in scores:
            reason = refuse_array(key, reply.arrays[key], shape=(self._shape.num_layers,), dtype=np.float64)
            if reason is None and not (np.abs(reply.arrays[key] - 0.5) <= 0.5 + 1e-6).all():
                reason = f"{key}: expected similarities from 0 to 1"
            if reason is not None:
                return reason
        at_most = float(self._tasks[reply.client].settings["max_rows"])
        width = 2 * self._shape.hidden_size + 1
        for key in self._factor_keys:
            ones = self._shape.hidden_size
            reason = refuse_factor(key, reply.arrays[key], ones, width=width, at_most=at_most, halves=self._halves)
            if reason is not None:
                return reason
        return None

    def _compare(self, reply: Reply | None) -> None:
        """The next reply in name order."""
        if reply is None:
            return
        self._held.append(reply)
        for key, seen in self._sizes.items():
            seen.append(row_size(reply.arrays[key], self._shape.hidden_size))
        if len(self.counted) + len(self._out_of_line) + len(self._held) >= MIN_COHORT:
            self._merge_held()

    def _merge_held(self) -> None:
        for index, reply in enumerate(self._held):
            reason = None
            for key, seen in self._sizes.items():
                if len(seen) >= MIN_COHORT and reason is None:
                    own = seen[index - len(self._held)]
                    reason = refuse_size(key, own, float(np.median(seen)), limit=self._norm_limit)
            if reason is None:
                self._merge(reply)
            else:
                self._out_of_line[reply.client] = reason
        self._held.clear()

    def _merge(self, reply: Reply) -> None:
        self.counted.append(reply.client)
        weight = min(reply.num_samples, self._max_weight or reply.num_samples)
        self.total_samples += weight
        if self._with_scores:
            self._weighted_scores += weight * reply.arrays[SCORES_KEY]
        for key in self._factor_keys:  # one depth at a time: never two full sets of statistics beside the reply
            parts = [{key: self._factors[key]}] if key in self._factors else []
            self._factors[key] = stand_in.merge([*parts, {key: reply.arrays[key]}])[key]
