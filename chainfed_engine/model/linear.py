"""A frozen linear layer whose weight stays in the layer store: `FrozenLinear`.

Enters: x [..., K] (f32; f64 for gradient checks). Leaves: x W^T + bias [..., N], and in backward grad W. The weight is
leased from the store for the length of one native call, in forward and again in backward; autograd saves the binding
(store, file, tensor name) and neither the weight nor x, since a frozen weight has no gradient. `out` is allocated here;
scratch memory is the model's one `Workspace`. Where x is decides where the product is computed; on a CUDA device the
exact path of f64 does not exist.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chainfed_engine import native
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.model.device_weights import DeviceLease
from chainfed_engine.model.place import device_of, stream_of

Activation = Literal["int8", "f32"]
_ROWS_PER_BLOCK = 1024  # decoded at a time on the f64 path


class LeaseSource(Protocol):
    def weights(self, file: int) -> native.Lease | DeviceLease: ...


@dataclass(frozen=True)
class Binding:
    """Which matrix of which file; immutable, so that a graph keeps pointing at the layer it was built with."""

    store: LeaseSource
    file: int
    name: str  # of the weight inside the file


@dataclass
class Compute:
    """How one model multiplies, where, and its scratch memory: one buffer, grown to the largest call seen."""

    activation: Activation
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workspace: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def scratch(self, num_bytes: int) -> Tensor:
        """uint8 [at least num_bytes], contents undefined, valid until the next call."""
        if self.workspace.numel() < num_bytes or self.workspace.device != self.device:
            self.workspace = torch.empty(0, dtype=torch.uint8)  # free the old one before asking for the new one
            self.workspace = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return self.workspace


class LowRank(Protocol):
    """A trainable addition to a frozen linear: scale * (x A^T) B^T."""

    def __call__(self, x: Tensor) -> Tensor: ...


class FrozenLinear(nn.Module):
    """Stands in for an `nn.Linear(in_features, out_features)`. Unusable until `bind` has been called.

    `bias` is f32 [N] or None; `low_rank` is set by the layer for as long as an adapter acts on this projection.
    """

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, has_bias: bool, compute: Compute) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.compute = compute
        self.binding: Binding | None = None
        self.low_rank: LowRank | None = None
        bias = torch.zeros(out_features, device=compute.device) if has_bias else None
        self.register_buffer("bias", bias, persistent=False)

    def bind(self, binding: Binding) -> None:
        self.binding = binding

    def forward(self, x: Tensor) -> Tensor:
        if self.binding is None:
            raise InvalidArgument("FrozenLinear: expected bind(...) before the first forward")
        if x.shape[-1] != self.in_features:
            raise InvalidArgument(f"{self.binding.name}: expected [..., {self.in_features}], got {list(x.shape)}")
        out: Tensor = _Linear.apply(x, self.binding, self.bias, self.compute, self.out_features)  # type: ignore[no-untyped-call]
        return out if self.low_rank is None else out + self.low_rank(x)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, binding: Binding, bias: Tensor | None, compute: Compute, out_features: int
    ) -> Tensor:
        ctx.binding, ctx.compute, ctx.in_features = binding, compute, x.shape[-1]
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        with binding.store.weights(binding.file) as lease:
            matrix = lease.matrix(binding.name)
            out = (
                _exact_forward(matrix, rows, bias)
                if x.dtype == torch.float64
                else _forward(matrix, rows, bias, compute)
            )
        return out.view(*x.shape[:-1], out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows = grad_out.detach().reshape(-1, grad_out.shape[-1]).contiguous()
        with ctx.binding.store.weights(ctx.binding.file) as lease:
            matrix = lease.matrix(ctx.binding.name)
            exact = grad_out.dtype == torch.float64
            grad = _exact_grad_input(matrix, rows) if exact else _grad_input(matrix, rows, ctx.compute)
        return grad.view(*grad_out.shape[:-1], ctx.in_features), None, None, None, None


def _forward(matrix: native.Matrix, x: Tensor, bias: Tensor | None, compute: Compute) -> Tensor:
    out = torch.empty(x.shape[0], matrix.num_rows, device=x.device)
    num_bytes = native.linear_forward_workspace_bytes(
        matrix.block_format, x.shape[0], matrix.num_rows, matrix.num_cols, device_of(x)
    )
    workspace = compute.scratch(num_bytes)
    native.linear_forward(
        matrix, x, bias, activation=compute.activation, out=out, workspace=workspace, stream=stream_of(x)
    )
    return out


def _grad_input(matrix: native.Matrix, grad_out: Tensor, compute: Compute) -> Tensor:
    out = torch.empty(grad_out.shape[0], matrix.num_cols, device=grad_out.device)
    num_bytes = native.linear_grad_input_workspace_bytes(
        matrix.block_format, grad_out.shape[0], matrix.num_rows, matrix.num_cols, device_of(grad_out)
    )
    workspace = compute.scratch(num_bytes)
    native.linear_grad_input(
        matrix, grad_out, activation=compute.activation, out=out, workspace=workspace, stream=stream_of(grad_out)
    )
    return out


def _decoded_blocks(matrix: native.Matrix) -> Iterator[tuple[slice, Tensor]]:
    for begin in range(0, matrix.num_rows, _ROWS_PER_BLOCK):
        end = min(begin + _ROWS_PER_BLOCK, matrix.num_rows)
        block = torch.empty(end - begin, matrix.num_cols)
        native.dequantize_rows(matrix, begin, end, out=block)
        yield slice(begin, end), block.double()


def _exact_forward(matrix: native.Matrix, x: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.empty(x.shape[0], matrix.num_rows, dtype=torch.float64)
    for rows, weight in _decoded_blocks(matrix):
        out[:, rows] = x @ weight.T
    return out if bias is None else out + bias


def _exact_grad_input(matrix: native.Matrix, grad_out: Tensor) -> Tensor:
    out = torch.zeros(grad_out.shape[0], matrix.num_cols, dtype=torch.float64)
    for rows, weight in _decoded_blocks(matrix):
        out += grad_out[:, rows] @ weight
    return out
