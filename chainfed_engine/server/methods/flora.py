"""FLoRA: clients train LoRA of different ranks; the update is the sum of their products, without averaging noise.

Stacking the factors [p_1 B_1 ... p_n B_n] and [A_1; ...; A_n] gives exactly sum_i p_i B_i A_i (p_i: share of samples),
which is added to the base of every projection; the next round starts from fresh factors. The base here is quantised, so
the sum is kept beside it as `query_base` and `value_base` [N, K] and sent in that form to whoever lacks it: a client
that missed rounds would need all their stacks. Source: Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models
with Heterogeneous Low-Rank Adaptations", NeurIPS 2024, arXiv 2409.05976.
"""

from collections.abc import Mapping

import numpy as np

from chainfed_engine.server.aggregate import federated_average
from chainfed_engine.server.methods.averaging import Averaging
from chainfed_engine.server.sampling import RANK_STREAM, client_seed
from chainfed_engine.types import Arrays, Reply, Scalar, Stage, Task


class Stacking(Averaging):
    averages_values = False

    def needed(self, stage: Stage, start_layer: int) -> tuple[Arrays, dict[str, str]]:
        """The classifier and every base that is not zero; the factors start anew on the client."""
        trained = self.model.trained(stage)
        bases = [key for key, array in trained.items() if key.endswith("_base") and array.any()]
        return self.model.select([*bases, *(key for key in trained if key.startswith("classifier."))])

    def settings(self, client: str) -> dict[str, Scalar]:
        return {"rank": self.rank(client)}

    def rank(self, client: str) -> int:
        """`adapter_size`, halved as often as chance says, no lower than `min_rank`; the same in every round."""
        ranks = [self.config.adapter_size]
        lowest = self.config.min_rank or max(1, ranks[0] // 4)
        while ranks[-1] // 2 >= lowest:
            ranks.append(ranks[-1] // 2)
        return ranks[client_seed(self.config.seed, RANK_STREAM, 0, client) % len(ranks)]

    def expected(self, task: Task) -> Mapping[str, np.ndarray]:
        assert task.stage is not None
        rank = self.rank(task.client)
        expected: Arrays = {}
        for key, array in self.model.trained(task.stage).items():
            if key.endswith("_a"):
                expected[key] = array[:rank]
            elif key.endswith("_b"):
                expected[key] = array[:, :rank]
            elif key.startswith("classifier."):
                expected[key] = array
        return expected

    def before(self, task: Task) -> Mapping[str, np.ndarray]:
        """Factors are measured from nothing, the classifier from the global one."""
        known = self.expected(task)
        return {key: array if key.startswith("classifier.") else np.zeros_like(array) for key, array in known.items()}

    def combine(self, replies: Mapping[str, Reply]) -> Arrays:
        ordered = [replies[name] for name in sorted(replies)]
        total = float(sum(reply.num_samples for reply in ordered))
        combined: Arrays = {}
        for key in ordered[0].arrays:
            if not key.endswith("_a"):
                continue
            name = key.removesuffix("_a")
            stacked_a = np.concatenate([reply.arrays[key].astype(np.float64) for reply in ordered])
            shares = [reply.arrays[f"{name}_b"].astype(np.float64) * (reply.num_samples / total) for reply in ordered]
            stacked_b = np.concatenate(shares, axis=1)
            base = self.model.array(f"{name}_base")
            combined[f"{name}_base"] = np.asarray(base + stacked_b @ stacked_a, np.float32)
        heads = {
            name: Reply("train", name, reply.round_id, reply.num_samples, _classifier(reply.arrays))
            for name, reply in replies.items()
        }
        return {**combined, **federated_average(heads)}


def _classifier(arrays: Arrays) -> Arrays:
    return {key: array for key, array in arrays.items() if key.startswith("classifier.")}
