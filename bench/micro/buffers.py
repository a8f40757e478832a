"""Matrices, outputs and workspaces for the kernel benchmarks; torch tensors throughout, which start at 64 bytes."""

import torch
from torch import Tensor

from chainfed_engine import native

SHARD_ROWS = 8192


def quantised_matrix(weight: Tensor, block_format: str) -> native.Matrix:
    """weight f32 [N, K] in int4, nf4 or int8."""
    rows, cols = weight.shape
    codes = torch.empty(
        native.codes_bytes(block_format, rows, cols), dtype=torch.int8 if block_format == "int8" else torch.uint8
    )
    scale_dtype = torch.float32 if block_format == "nf4" else torch.float16
    scales = torch.empty(native.scales_bytes(block_format, rows, cols) // scale_dtype.itemsize, dtype=scale_dtype)
    native.quantize_blocks(weight, block_format=block_format, codes_out=codes, scales_out=scales)
    return native.Matrix.from_arrays(codes, scales, block_format=block_format, num_rows=rows, num_cols=cols)


class Linear:
    """A frozen matrix with out and workspace of its own for M rows, forward or grad-input."""

    def __init__(self, matrix: native.Matrix, num_tokens: int, *, forward: bool) -> None:
        rows, cols, block_format = matrix.num_rows, matrix.num_cols, matrix.block_format
        self.matrix = matrix
        size = native.linear_forward_workspace_bytes if forward else native.linear_grad_input_workspace_bytes
        self.workspace = torch.empty(size(block_format, num_tokens, rows, cols), dtype=torch.uint8)
        self.out = torch.empty(num_tokens, rows if forward else cols)

    @property
    def call_bytes(self) -> int:
        """What a call needs beside its inputs: the kernels allocate nothing."""
        return self.out.nbytes + self.workspace.nbytes

    def forward(self, x: Tensor) -> None:
        native.linear_forward(self.matrix, x, None, activation="int8", out=self.out, workspace=self.workspace)

    def grad_input(self, grad_out: Tensor) -> None:
        native.linear_grad_input(self.matrix, grad_out, out=self.out, workspace=self.workspace)


class Head:
    """A frozen vocabulary in shards, as a layer store streams it; `step` gives loss and gradient of hidden."""

    def __init__(self, weight: Tensor, num_tokens: int, block_format: str = "int8") -> None:
        width = weight.shape[1]
        self.shards = [
            (quantised_matrix(weight[first : first + SHARD_ROWS], block_format), first)
            for first in range(0, len(weight), SHARD_ROWS)
        ]
        size = native.cross_entropy_workspace_bytes(block_format, num_tokens, SHARD_ROWS, width)
        self.workspace = torch.empty(size, dtype=torch.uint8)
        self.tokens = {name: torch.empty(num_tokens) for name in ("running_max", "running_sum", "target_logit")}
        self.rows = {name: torch.empty(num_tokens, width) for name in ("grad", "target_row")}
        self.loss = torch.empty(num_tokens)

    @property
    def call_bytes(self) -> int:
        buffers = [self.workspace, self.loss, *self.tokens.values(), *self.rows.values()]
        return sum(buffer.nbytes for buffer in buffers)

    def step(self, hidden: Tensor, targets: Tensor) -> None:
        self.tokens["running_max"].fill_(-torch.inf)
        for name in ("running_sum", "target_logit"):
            self.tokens[name].zero_()
        for buffer in self.rows.values():
            buffer.zero_()
        state = {**self.tokens, **self.rows}
        for matrix, first_row in self.shards:
            native.cross_entropy_update(
                matrix, first_row, hidden, targets, activation="int8", workspace=self.workspace, **state
            )
        native.cross_entropy_finish(token_weight=None, loss_out=self.loss, **state)
