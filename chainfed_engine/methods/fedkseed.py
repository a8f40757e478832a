"""FedKSeed on a client: zeroth-order steps along directions of a fixed set of seeds; what is sent is one number a seed.

The parameters are rebuilt from the run's start and the K coefficients that came; every step draws a seed of the set,
measures the slope along its direction and goes -lr * slope that way. Source: Qin et al., ICML 2024, arXiv 2312.06353
(see `server.methods.fedkseed`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chainfed_engine.config import ChainConfig
from chainfed_engine.directions import candidate_seed, direction, walk
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.methods.forward import ForwardTrainer
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.types import SEED_COEFFICIENTS, Arrays, Batch, Scalar, Stage


class SeedTrainer(ForwardTrainer):
    def __init__(self, model: FrozenModel, config: ChainConfig, **options: Any) -> None:
        super().__init__(model, config, **options)
        self._origin = self.parameters.export()
        self._place: tuple[bytes, Arrays] = (b"", {})  # the last coefficients, and where they lead

    def begin(
        self,
        stage: Stage,
        arrays: Arrays,
        *,
        cache_dir: Path | None,
        lr: float,
        settings: Mapping[str, Scalar] | None = None,
    ) -> None:
        coefficients = arrays.get(SEED_COEFFICIENTS)
        if coefficients is None or coefficients.shape != (self.config.num_seeds,):
            raise InvalidArgument(f"fedkseed: expected {self.config.num_seeds} coefficients of the seeds' directions")
        super().begin(stage, self._rebuilt(coefficients), cache_dir=cache_dir, lr=lr, settings=settings)
        self._steps = np.zeros(self.config.num_seeds, np.float32)

    def step(self, batch: Batch) -> float:
        """One zeroth-order step; returns the mean loss around the parameters before it."""
        index = int(self.generator.integers(self.config.num_seeds))
        along = direction(candidate_seed(self.config.seed, index), self.shapes)
        slope, loss = self.slope(batch, along)
        length = np.float32(-self.lr * slope)
        with torch.no_grad():
            for key, tensor in self.trained_tensors.items():
                tensor.add_(torch.from_numpy(along[key]).to(tensor.device), alpha=float(length))
        self._steps[index] += length
        return loss

    def trained(self) -> Arrays:
        """How far this site went along each seed's direction, float32 [num_seeds]."""
        return {SEED_COEFFICIENTS: self._steps}

    def _rebuilt(self, coefficients: np.ndarray) -> Arrays:
        """Sites that share this trainer share the walk."""
        fingerprint = coefficients.tobytes()
        if self._place[0] != fingerprint:
            self._place = (fingerprint, walk(self._origin, coefficients, self.config.seed))
        return self._place[1]
