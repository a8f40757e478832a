"""FwdLLM on a client: the gradient from perturbed inferences, gathered over the round's batches, parameters unmoved.

For every batch `perturbations` random directions v are drawn; the gradient is the mean of (slope along v) * v over all
of them. Source: Xu et al., USENIX ATC 2024, arXiv 2308.13894 (see `server.methods.fwdllm`).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from chainfed_engine.directions import direction
from chainfed_engine.methods.forward import ForwardTrainer
from chainfed_engine.types import Arrays, Batch, Scalar, Stage


class ForwardGradientTrainer(ForwardTrainer):
    def begin(
        self,
        stage: Stage,
        arrays: Arrays,
        *,
        cache_dir: Path | None,
        lr: float,
        settings: Mapping[str, Scalar] | None = None,
    ) -> None:
        super().begin(stage, arrays, cache_dir=cache_dir, lr=lr, settings=settings)
        self._sums: Arrays = {key: np.zeros(shape, np.float32) for key, shape in self.shapes.items()}
        self._count = 0

    def step(self, batch: Batch) -> float:
        """Add the batch's forward gradients to the sum; returns the mean loss around the present parameters."""
        total = 0.0
        for _ in range(self.config.perturbations):
            along = direction(int(self.generator.integers(2**63)), self.shapes)
            slope, loss = self.slope(batch, along)
            for key, values in along.items():
                self._sums[key] += np.float32(slope) * values
            total += loss
        self._count += self.config.perturbations
        return total / self.config.perturbations

    def trained(self) -> Arrays:
        """The mean forward gradient, by parameter key."""
        return {key: total / np.float32(max(self._count, 1)) for key, total in self._sums.items()}
