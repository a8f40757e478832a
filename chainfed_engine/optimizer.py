"""AdamW for the few trained parameters of a stage, the very operations of torch's (Loshchilov and Hutter 2019).

torch's own class imports the compiler, with symbolic algebra some 60 MiB, when it is first built.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class AdamW:
    """State: two float32 tensors the size of each parameter. `lr` may be changed between steps."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parameters, self.lr = list(parameters), lr
        self._weight_decay, self._betas, self._eps = weight_decay, betas, eps
        self._moments: dict[int, tuple[Tensor, Tensor]] = {}
        self._steps: dict[int, int] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        decay_first, decay_second = self._betas
        for index, parameter in enumerate(self.parameters):
            grad = parameter.grad
            if grad is None:
                continue
            if index not in self._moments:
                self._moments[index] = (torch.zeros_like(parameter), torch.zeros_like(parameter))
            first, second = self._moments[index]
            count = self._steps[index] = self._steps.get(index, 0) + 1
            parameter.mul_(1 - self.lr * self._weight_decay)
            first.lerp_(grad, 1 - decay_first)
            second.mul_(decay_second).addcmul_(grad, grad, value=1 - decay_second)
            scale = (second.sqrt() / (1 - decay_second**count) ** 0.5).add_(self._eps)
            parameter.addcdiv_(first, scale, value=-(self.lr / (1 - decay_first**count)))

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
