"""The rule: every client trains the stage, the update is the average. Chain, probing, top window, full adapters, LoRA.

In: the round's stage; replies that were checked. Out: what each client needs and may answer; new global arrays.
Sources of the baselines among them: full adapters, Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for
NLP", ICML, arXiv 1902.00751; LoRA end to end with averaged factors, Zhang et al. 2023, "Towards Building the Federated
GPT: Federated Instruction Tuning" (FedIT), ICASSP 2024, arXiv 2305.05644; averaging, McMahan et al. 2017, arXiv
1602.05629.
"""

from collections.abc import Mapping

import numpy as np

from chainfed_engine.config import ChainConfig
from chainfed_engine.server.aggregate import aggregate
from chainfed_engine.server.checks import refuse_arrays
from chainfed_engine.server.global_model import GlobalModel
from chainfed_engine.types import Arrays, Reply, Scalar, Stage, Task


class Averaging:
    averages_values = True  # whether replies hold values of parameters, which any rule of aggregation may combine

    def __init__(self, config: ChainConfig, model: GlobalModel) -> None:
        self.config, self.model = config, model

    @classmethod
    def extra_state(cls, config: ChainConfig, initial: Mapping[str, np.ndarray]) -> Arrays:
        """Arrays `method.<name>` that the method keeps and saves beside the model, as they are before any round."""
        return {}

    def stage(self, stage: Stage, round_id: int, client: str) -> Stage:
        """What this client trains of the round's stage."""
        return stage

    def needed(self, stage: Stage, start_layer: int) -> tuple[Arrays, dict[str, str]]:
        """Arrays and versions of all that a client at this stage needs."""
        return self.model.needed(stage, start_layer)

    def settings(self, client: str) -> dict[str, Scalar]:
        """Settings of a training task beside those of every method."""
        return {}

    def expected(self, task: Task) -> Mapping[str, np.ndarray]:
        """Keys, shapes and dtypes of an update that answers `task`."""
        assert task.stage is not None
        return self.model.trained(task.stage)

    def refuse_update(self, task: Task, arrays: Arrays) -> str | None:
        """Why these arrays do not answer `task`, or None."""
        return refuse_arrays(arrays, self.expected(task))

    def refuse_statistics(self, task: Task, arrays: Arrays) -> str | None:
        """The same where the task asks for statistics of the classifier."""
        halves = self.config.update_format == "int8"
        return self.model.refuse_factor(arrays, at_most=float(task.settings["num_rows"]), halves=halves)

    def before(self, task: Task) -> Mapping[str, np.ndarray]:
        """What an update that answers `task` is measured from, to tell how large it is: here the global values."""
        return self.expected(task)

    def combine(self, replies: Mapping[str, Reply]) -> Arrays:
        """New values of global arrays from at least one usable reply, by client name."""
        return aggregate(self.config.aggregation, replies, hostile_share=self.config.hostile_share)
