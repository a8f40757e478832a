"""Cross-entropy without logits: against torch's linear + cross_entropy + backward, against float64, shard by shard."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from chainfed_engine import native
from chainfed_engine.errors import InvalidArgument

QUANTISED = ("int4", "nf4", "int8")


@pytest.fixture(params=native.simd_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    native.set_simd_level(request.param)
    yield request.param
    native.set_simd_level(None)


def matrix_of(weight: torch.Tensor, block_format: str) -> tuple[native.Matrix, torch.Tensor]:
    """A matrix and its decoded values, float64."""
    rows, cols = weight.shape
    codes_dtype = {"int8": torch.int8, "f32": torch.float32, "bf16": torch.bfloat16}.get(block_format, torch.uint8)
    codes = torch.zeros(native.codes_bytes(block_format, rows, cols) // codes_dtype.itemsize, dtype=codes_dtype)
    scales_dtype = torch.float32 if block_format == "nf4" else torch.float16
    scale_bytes = native.scales_bytes(block_format, rows, cols)
    scales = torch.zeros(scale_bytes // scales_dtype.itemsize, dtype=scales_dtype) if scale_bytes else None
    native.quantize_blocks(weight, block_format=block_format, codes_out=codes, scales_out=scales)
    matrix = native.Matrix.from_arrays(codes, scales, block_format=block_format, num_rows=rows, num_cols=cols)
    decoded = torch.empty(rows, cols)
    native.dequantize_rows(matrix, 0, rows, out=decoded)
    return matrix, decoded.double()


def shards_of(weight: torch.Tensor, block_format: str, rows: list[int]) -> list[native.Matrix]:
    ends = np.cumsum(rows)
    return [
        matrix_of(weight[end - count : end].contiguous(), block_format)[0]
        for end, count in zip(ends, rows, strict=True)
    ]


def problem(
    num_tokens: int, vocabulary: int, width: int, spread: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens * 1009 + vocabulary + width)
    weight = torch.randn(vocabulary, width, generator=generator)
    hidden = torch.randn(num_tokens, width, generator=generator) * spread / width**0.5
    return weight, hidden, torch.randint(0, vocabulary, (num_tokens,), generator=generator)


def new_state(hidden: torch.Tensor, *, with_grad: bool = True) -> dict[str, Any]:
    num_tokens = len(hidden)
    return {
        "running_max": torch.full((num_tokens,), -torch.inf),
        "running_sum": torch.zeros(num_tokens),
        "target_logit": torch.zeros(num_tokens),
        "grad": torch.zeros_like(hidden) if with_grad else None,
        "target_row": torch.zeros_like(hidden) if with_grad else None,
    }


def native_loss(
    shards: list[native.Matrix],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    activation: str = "f32",
    token_weight: torch.Tensor | None = None,
    with_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    state, first_row = new_state(hidden, with_grad=with_grad), 0
    for shard in shards:
        size = native.cross_entropy_workspace_bytes(shard.block_format, len(hidden), shard.num_rows, shard.num_cols)
        workspace = torch.empty(size, dtype=torch.uint8)
        native.cross_entropy_update(
            shard, first_row, hidden, targets, activation=activation, workspace=workspace, **state
        )
        first_row += shard.num_rows
    loss = torch.empty(len(hidden))
    native.cross_entropy_finish(token_weight=token_weight, loss_out=loss, **state)
    return loss, state["grad"]


def exact_loss(
    weight: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor, token_weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's own, in the precision of `weight`."""
    leaf = hidden.to(weight.dtype).requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf @ weight.T, targets, reduction="none")
    total = loss.sum() if token_weight is None else (loss * token_weight.to(weight.dtype)).sum()
    (grad,) = torch.autograd.grad(total, leaf)
    return loss.detach(), grad


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_f32_weights_give_torchs_loss_and_gradient(level: str, spread: float) -> None:
    weight, hidden, targets = problem(50, 1300, 96, spread)
    loss, grad = native_loss([matrix_of(weight, "f32")[0]], hidden, targets)
    torch_loss, torch_grad = exact_loss(weight, hidden, targets)
    torch.testing.assert_close(loss, torch_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, torch_grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("block_format", [*QUANTISED, "bf16", "f32"])
@pytest.mark.parametrize("shape", [(1, 9, 3), (7, 515, 65), (258, 300, 40)])
def test_decoded_weights_give_the_float64_loss_and_gradient(
    level: str, block_format: str, shape: tuple[int, int, int]
) -> None:
    weight, hidden, targets = problem(*shape, spread=3.0)
    token_weight = torch.linspace(0.1, 2.0, len(hidden))
    matrix, decoded = matrix_of(weight, block_format)
    loss, grad = native_loss([matrix], hidden, targets, token_weight=token_weight)
    wanted_loss, wanted_grad = exact_loss(decoded, hidden, targets, token_weight)
    assert grad is not None
    assert float(((loss - wanted_loss).abs() / wanted_loss.abs().clamp(min=1)).max()) <= 1e-5
    assert float((grad - wanted_grad).norm() / wanted_grad.norm()) <= 1e-5


@pytest.mark.parametrize("block_format", QUANTISED)
def test_int8_activations_keep_the_gradients_direction(level: str, block_format: str) -> None:
    weight, hidden, targets = problem(64, 4096, 256, spread=4.0)
    matrix, decoded = matrix_of(weight, block_format)
    loss, grad = native_loss([matrix], hidden, targets, activation="int8")
    wanted_loss, wanted_grad = exact_loss(decoded, hidden, targets)
    assert grad is not None
    assert cosine(grad, wanted_grad) >= 0.9999
    assert float((loss - wanted_loss).norm() / wanted_loss.norm()) <= 5e-3
    assert abs(float((loss - wanted_loss).mean() / wanted_loss.mean())) <= 1e-3


@pytest.mark.parametrize("activation", ["int8", "f32"])
def test_several_shards_give_what_one_gives(level: str, activation: str) -> None:
    weight, hidden, targets = problem(33, 1000, 64, spread=5.0)
    one_loss, one_grad = native_loss([matrix_of(weight, "int8")[0]], hidden, targets, activation=activation)
    shards = shards_of(weight, "int8", [64, 8, 600, 328])
    loss, grad = native_loss(shards, hidden, targets, activation=activation)
    torch.testing.assert_close(loss, one_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, one_grad, rtol=0, atol=1e-5 if activation == "f32" else 2e-3)


def test_the_loss_alone_is_the_loss_of_the_gradient_pass(level: str) -> None:
    weight, hidden, targets = problem(21, 700, 48)
    shards = shards_of(weight, "int4", [512, 188])
    with_grad, _ = native_loss(shards, hidden, targets, activation="int8")
    alone, none = native_loss(shards, hidden, targets, activation="int8", with_grad=False)
    assert none is None
    assert torch.equal(alone, with_grad)


def test_threads_and_neighbours_do_not_change_a_row(level: str) -> None:
    weight, hidden, targets = problem(30, 900, 72, spread=6.0)
    matrix, _ = matrix_of(weight, "int8")
    before = native.num_threads()
    try:
        native.set_num_threads(1)
        loss, grad = native_loss([matrix], hidden, targets, activation="int8")
        native.set_num_threads(3)
        threaded = native_loss([matrix], hidden, targets, activation="int8")
    finally:
        native.set_num_threads(before)
    assert grad is not None and threaded[1] is not None
    assert torch.equal(loss, threaded[0]) and torch.equal(grad, threaded[1])
    alone_loss, alone_grad = native_loss([matrix], hidden[7:9].clone(), targets[7:9].clone(), activation="int8")
    assert alone_grad is not None
    assert torch.equal(alone_loss, loss[7:9]) and torch.equal(alone_grad, grad[7:9])


@pytest.mark.parametrize("activation", ["int8", "f32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_row_alone_has_a_nan_loss(level: str, activation: str, value: float) -> None:
    weight, hidden, targets = problem(6, 600, 64)
    matrix, _ = matrix_of(weight, "int8")
    clean_loss, clean_grad = native_loss([matrix], hidden, targets, activation=activation)
    broken = hidden.clone()
    broken[2, 63] = value
    loss, grad = native_loss([matrix], broken, targets, activation=activation)
    assert grad is not None and clean_grad is not None
    others = torch.arange(6) != 2
    assert bool(loss[2].isnan()) and bool(grad[2].isnan().all())
    assert torch.equal(loss[others], clean_loss[others]) and torch.equal(grad[others], clean_grad[others])


def test_huge_logits_neither_overflow_nor_lose_the_gradient(level: str) -> None:
    weight, hidden, targets = problem(12, 800, 64, spread=3000.0)
    matrix, decoded = matrix_of(weight, "f32")
    loss, grad = native_loss([matrix], hidden, targets)
    wanted_loss, wanted_grad = exact_loss(decoded, hidden, targets)
    assert grad is not None
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=1e-5, atol=1e-3)
    assert cosine(grad, wanted_grad) >= 0.999999


def test_no_tokens_are_no_work(level: str) -> None:
    weight, hidden, targets = problem(3, 40, 32)
    loss, grad = native_loss([matrix_of(weight, "int8")[0]], hidden[:0], targets[:0])
    assert loss.shape == (0,) and grad is not None and grad.shape == (0, 32)


def test_the_workspace_depends_on_neither_vocabulary_nor_many_tokens() -> None:
    for block_format in (*QUANTISED, "bf16", "f32"):
        size = native.cross_entropy_workspace_bytes(block_format, 256, 8192, 8192)
        assert size <= 16 * 2**20
        assert native.cross_entropy_workspace_bytes(block_format, 10**6, 10**6, 8192) == size


def call_update(**changes: Any) -> None:
    weight, hidden, targets = problem(5, 80, 32)
    matrix, _ = matrix_of(weight, "int8")
    size = native.cross_entropy_workspace_bytes("int8", 5, 80, 32)
    arguments: dict[str, Any] = {
        "shard": matrix,
        "first_row": 0,
        "hidden": hidden,
        "targets": targets,
        "activation": "int8",
        "workspace": torch.empty(size, dtype=torch.uint8),
        **new_state(hidden),
    }
    native.cross_entropy_update(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "bf16"}, "activation must be int8 or f32, got bf16"),
        ({"first_row": -1}, "first_row"),
        ({"hidden": torch.zeros(5, 31)}, "hidden must be float32"),
        ({"hidden": torch.zeros(5, 64)[:, ::2]}, "hidden must be .* got a strided"),
        ({"hidden": torch.zeros(5, 32, dtype=torch.float64)}, "hidden must be float32"),
        ({"targets": torch.zeros(5, dtype=torch.int32)}, "targets must be int64"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets must be int64"),
        ({"targets": torch.tensor([0, 1, -100, 3, 4])}, "targets must be vocabulary rows .* got -100 at position 2"),
        ({"running_max": torch.zeros(6)}, "running_max must be"),
        ({"running_sum": torch.zeros(5, dtype=torch.float64)}, "running_sum must be"),
        ({"target_logit": torch.zeros(5, 1)}, "target_logit must be"),
        ({"grad": None}, "grad and target_row must be given both or neither"),
        ({"target_row": torch.zeros(5, 33)}, "target_row must be"),
        ({"workspace": torch.empty(64, dtype=torch.uint8)}, "workspace must be"),
        ({"workspace": torch.empty(2**20 + 1, dtype=torch.uint8)[1:]}, "workspace must start at a multiple of 64"),
    ],
)
def test_update_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call_update(**changes)


def test_update_refuses_shared_memory() -> None:
    shared = torch.zeros(5, 32)
    with pytest.raises(InvalidArgument, match="must not share memory"):
        call_update(grad=shared, target_row=shared)
    with pytest.raises(InvalidArgument, match="must not share memory"):
        call_update(hidden=shared, grad=shared)


def test_a_read_only_output_is_refused() -> None:
    read_only = np.zeros((5, 32), np.float32)
    read_only.flags.writeable = False
    with pytest.raises(InvalidArgument, match="grad must be writable"):
        call_update(grad=read_only)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_out": torch.zeros(4)}, "loss_out must be"),
        ({"token_weight": torch.zeros(5, 1)}, "token_weight must be"),
        ({"target_row": None}, "grad and target_row must be given both or neither"),
        ({"target_row": torch.zeros(5, 16)}, "target_row must be"),
    ],
)
def test_finish_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    arguments = {**new_state(torch.zeros(5, 32)), "token_weight": None, "loss_out": torch.zeros(5)}
    with pytest.raises(InvalidArgument, match=message):
        native.cross_entropy_finish(**(arguments | changes))


@pytest.mark.parametrize("sizes", [(-1, 10, 32), (5, 0, 32), (5, 10, 0), (5, 10, 2**62)])
def test_workspace_refuses_impossible_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidArgument):
        native.cross_entropy_workspace_bytes("int8", *sizes)
    with pytest.raises(InvalidArgument):
        native.cross_entropy_workspace_bytes("int5", 1, 8, 32)
