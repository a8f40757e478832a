"""FwdLLM: clients send gradients estimated from losses alone; the server steps once they agree well enough.

Gradients of several rounds are gathered on unchanged parameters until the variance of their weighted mean, relative to
the mean's squared length, is at most `max_variance` (of pure noise it is 1), or `max_gather_rounds` were gathered; then
the parameters move by -lr times the mean. Source: Xu, Cai, Wu, Li, Wang, "FwdLLM: Efficient Federated Finetuning of
Large Language Models with Perturbed Inferences", USENIX ATC 2024, arXiv 2308.13894; its choosing among candidate
directions is left out.
"""

from collections.abc import Mapping

import numpy as np

from chainfed_engine.config import ChainConfig
from chainfed_engine.schedule import learning_rate
from chainfed_engine.server.methods.averaging import Averaging
from chainfed_engine.types import Arrays, Reply, Task

SUMS = "method.gathered."  # + key: sum of samples * gradient
COUNTS = "method.gathered_counts"  # samples, sum of samples^2, sum of samples^2 * |gradient|^2, rounds


class ForwardGradients(Averaging):
    averages_values = False

    @classmethod
    def extra_state(cls, config: ChainConfig, initial: Mapping[str, np.ndarray]) -> Arrays:
        return {**{SUMS + key: np.zeros_like(array) for key, array in initial.items()}, COUNTS: np.zeros(4, np.float32)}

    def before(self, task: Task) -> Mapping[str, np.ndarray]:
        return {key: np.zeros_like(array) for key, array in self.expected(task).items()}

    def combine(self, replies: Mapping[str, Reply]) -> Arrays:
        ordered = [replies[name] for name in sorted(replies)]
        keys = list(ordered[0].arrays)
        sums = {key: self.model.array(SUMS + key).astype(np.float64) for key in keys}
        counts = self.model.array(COUNTS).astype(np.float64)
        for reply in ordered:
            samples = reply.num_samples
            for key in keys:
                sums[key] += samples * reply.arrays[key].astype(np.float64)
            counts += (samples, samples**2, samples**2 * squared_length(reply.arrays), 0)
        counts[3] += 1
        if counts[3] < self.config.max_gather_rounds and relative_variance(sums, counts) > self.config.max_variance:
            gathered: Arrays = {SUMS + key: np.asarray(total, np.float32) for key, total in sums.items()}
            return {**gathered, COUNTS: np.asarray(counts, np.float32)}
        moved: Arrays = {}
        config = self.config
        lr = learning_rate(config.lr, config.lr_decay, ordered[0].round_id, config.rounds)
        for key in keys:
            step = lr * sums[key] / counts[0]
            moved[key] = np.asarray(self.model.array(key) - step, np.float32)
            moved[SUMS + key] = np.zeros_like(moved[key])
        return {**moved, COUNTS: np.zeros(4, np.float32)}


def relative_variance(sums: Mapping[str, np.ndarray], counts: np.ndarray) -> float:
    """Unbiased squared standard error of the weighted mean over its squared length; infinite with one gradient."""
    samples, squares, lengths, _ = (float(value) for value in counts)
    mean_length = squared_length(sums) / samples**2
    spread = 1 - squares / samples**2
    if spread <= 0 or mean_length == 0:
        return float("inf")
    return (lengths / samples**2 - squares / samples**2 * mean_length) / spread / mean_length


def squared_length(arrays: Mapping[str, np.ndarray]) -> float:
    return float(sum(np.square(array, dtype=np.float64).sum() for array in arrays.values()))
