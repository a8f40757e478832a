"""Training from losses alone: no graph is built, parameters are moved along random directions and put back.

`ForwardTrainer` is what FwdLLM and FedKSeed share: the loss of a batch at the present parameters plus a multiple of a
direction, and its slope along that direction by a central difference. Memory is that of inference, plus one direction.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chainfed_engine.errors import InvalidArgument, NonFiniteLoss
from chainfed_engine.model.place import batch_on
from chainfed_engine.step import StageTrainer
from chainfed_engine.types import Arrays, Batch, Scalar, Stage


class ForwardTrainer(StageTrainer):
    """`trained_tensors`: key -> parameter of what the stage trains; `generator`: the site's own, seeded by the task."""

    trained_tensors: dict[str, Tensor]
    generator: np.random.Generator

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
        for parameter in self.parameters.tensors():
            parameter.requires_grad_(False)
        keys = self.parameters.keys(stage.window)
        tensors = self.optimizer.parameters
        self.trained_tensors = dict(zip(keys, tensors, strict=True))
        self.generator = np.random.default_rng(int((settings or {}).get("seed", self.config.seed)))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(tensor.shape) for key, tensor in self.trained_tensors.items()}

    @torch.no_grad()
    def slope(self, batch: Batch, direction: Arrays) -> tuple[float, float]:
        """Derivative of the batch's loss along `direction`, and the mean of the two losses it was computed from."""
        step = self.config.perturbation_step
        origin = {key: tensor.clone() for key, tensor in self.trained_tensors.items()}
        losses = []
        for sign in (1.0, -1.0):
            for key, tensor in self.trained_tensors.items():
                along = torch.from_numpy(direction[key]).to(tensor.device)
                torch.add(origin[key], along, alpha=sign * step, out=tensor)
            losses.append(self.loss(batch))
        for key, tensor in self.trained_tensors.items():
            tensor.copy_(origin[key])
        if not all(map(math.isfinite, losses)):
            raise NonFiniteLoss(f"loss became {losses} beside the present parameters; lower [train] lr (now {self.lr})")
        return (losses[0] - losses[1]) / (2 * step), sum(losses) / 2

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """The stage's loss, micro-batch by micro-batch, without a graph."""
        if self.window is None:
            raise InvalidArgument("loss: no stage has begun; call begin first")
        total = 0.0
        for micro, share in self._micro_batches(batch):
            hidden = self.window(self.boundary(micro), self.model.context(micro))
            total += share * float(self.objective(hidden, batch_on(micro, hidden.device)))
        return total
