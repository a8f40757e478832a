"""FedKSeed: only K numbers travel, one for each direction of a fixed set of seeds, whatever the model's size.

The model is its start plus sum_j coefficients[j] * direction_j; clients take zeroth-order steps along directions of the
set and send how far they went along each. Source: Qin et al., "Federated Full-Parameter Tuning of Billion-Sized
Language Models with Communication Cost under 18 Kilobytes", ICML 2024, arXiv 2312.06353. Here the parameters are all
adapters and the classifier (the base is quantised and frozen), and seeds are drawn uniformly.
"""

from collections.abc import Mapping

import numpy as np

from chainfed_engine.config import ChainConfig
from chainfed_engine.directions import walk
from chainfed_engine.server.aggregate import federated_average
from chainfed_engine.server.global_model import GlobalModel
from chainfed_engine.server.methods.averaging import Averaging
from chainfed_engine.types import SEED_COEFFICIENTS, Arrays, Reply, Stage, Task


class SeedSums(Averaging):
    averages_values = False

    def __init__(self, config: ChainConfig, model: GlobalModel) -> None:
        super().__init__(config, model)
        self._origin = model.parameters()

    @classmethod
    def extra_state(cls, config: ChainConfig, initial: Mapping[str, np.ndarray]) -> Arrays:
        return {SEED_COEFFICIENTS: np.zeros(config.num_seeds, np.float32)}

    def needed(self, stage: Stage, start_layer: int) -> tuple[Arrays, dict[str, str]]:
        return self.model.select([SEED_COEFFICIENTS])

    def expected(self, task: Task) -> Mapping[str, np.ndarray]:
        return {SEED_COEFFICIENTS: self.model.array(SEED_COEFFICIENTS)}

    def before(self, task: Task) -> Mapping[str, np.ndarray]:
        return {key: np.zeros_like(array) for key, array in self.expected(task).items()}

    def combine(self, replies: Mapping[str, Reply]) -> Arrays:
        """Steps along one direction add up, so the average of walks is the walk of averaged coefficients."""
        steps = federated_average(replies)[SEED_COEFFICIENTS]
        coefficients = np.asarray(self.model.array(SEED_COEFFICIENTS) + steps, np.float32)
        return {**walk(self._origin, coefficients, self.config.seed), SEED_COEFFICIENTS: coefficients}
