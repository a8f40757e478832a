"""For every function of the core and every array it takes: wrong dtype, rank, size, stride, device, alignment, alias,
and read-only output each raise InvalidArgument that names function and argument, and leave every buffer as it was.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from chainfed_engine import native
from chainfed_engine.errors import InvalidArgument

sys.path.insert(0, str(Path(__file__).parent))
from arrays import aligned, code_array, like, normal, quantised, scale_array

TOKENS, ROWS, COLS = 5, 24, 64


@dataclass
class Case:
    """A call that works. `outputs` are written; `free` arrays fix other shapes, so that only rank and dtype are theirs;
    `flat` arrays may have any shape of the right number of elements; `minimum` arrays may be larger."""

    name: str
    arrays: dict[str, NDArray]
    call: Callable[[dict[str, Any]], object]
    outputs: set[str] = field(default_factory=set)
    free: set[str] = field(default_factory=set)
    flat: set[str] = field(default_factory=set)
    minimum: set[str] = field(default_factory=set)

    def function(self) -> str:
        return self.name.split("[")[0]


def floats(*shape: int) -> NDArray:
    return like(np.random.default_rng(3).standard_normal(shape).astype(np.float32))


def linear_cases() -> list[Case]:
    matrix, _ = quantised(normal(ROWS, COLS), "int4")
    forward_bytes = native.linear_forward_workspace_bytes("int4", TOKENS, ROWS, COLS)
    grad_bytes = native.linear_grad_input_workspace_bytes("int4", TOKENS, ROWS, COLS)
    forward = {
        "x": floats(TOKENS, COLS),
        "bias": floats(ROWS),
        "out": floats(TOKENS, ROWS),
        "workspace": aligned((forward_bytes,), np.uint8),
    }
    grad = {
        "grad_out": floats(TOKENS, ROWS),
        "out": floats(TOKENS, COLS),
        "workspace": aligned((grad_bytes,), np.uint8),
    }
    written = {"out", "workspace"}
    return [
        Case(
            f"linear_forward[{activation}]",
            dict(forward),
            lambda a, activation=activation: native.linear_forward(
                matrix, a["x"], a["bias"], activation=activation, out=a["out"], workspace=a["workspace"]
            ),
            written,
            minimum={"workspace"},
        )
        for activation in ("int8", "f32")
    ] + [
        Case(
            "linear_grad_input",
            grad,
            lambda a: native.linear_grad_input(matrix, a["grad_out"], out=a["out"], workspace=a["workspace"]),
            written,
            minimum={"workspace"},
        )
    ]


def quant_cases() -> list[Case]:
    matrix, _ = quantised(normal(ROWS, COLS), "int4")
    codes, scales = code_array("int4", ROWS, COLS), scale_array("int4", ROWS, COLS)
    assert scales is not None
    stored = {"codes_out": codes, "scales_out": scales}
    blocks = aligned((ROWS, COLS // 32 * 20), np.uint8)
    eight_scales = scale_array("int8", ROWS, COLS)
    assert eight_scales is not None
    eight_bit = {"codes_out": code_array("int8", ROWS, COLS), "scales_out": eight_scales}
    return [
        Case(
            "quantize_blocks",
            {"weight": floats(ROWS, COLS), **stored},
            lambda a: native.quantize_blocks(
                a["weight"], block_format="int4", codes_out=a["codes_out"], scales_out=a["scales_out"]
            ),
            set(stored),
            free={"weight"},
            flat=set(stored),
        ),
        Case(
            "repack_q4_1",
            {"blocks": blocks, **{name: like(array) for name, array in stored.items()}},
            lambda a: native.repack_q4_1(
                a["blocks"], num_rows=ROWS, num_cols=COLS, codes_out=a["codes_out"], scales_out=a["scales_out"]
            ),
            set(stored),
            flat=set(stored),
        ),
        Case(
            "repack_q8_0",
            {"blocks": aligned((ROWS, COLS // 32 * 34), np.uint8), **eight_bit},
            lambda a: native.repack_q8_0(
                a["blocks"], num_rows=ROWS, num_cols=COLS, codes_out=a["codes_out"], scales_out=a["scales_out"]
            ),
            set(stored),
            flat=set(stored),
        ),
        Case(
            "Matrix.from_arrays",
            {"codes": like(codes), "scales": like(scales)},
            lambda a: native.Matrix.from_arrays(
                a["codes"], a["scales"], block_format="int4", num_rows=ROWS, num_cols=COLS
            ),
            flat={"codes", "scales"},
        ),
        Case(
            "dequantize_rows",
            {"out": floats(ROWS, COLS)},
            lambda a: native.dequantize_rows(matrix, 0, ROWS, out=a["out"]),
            {"out"},
        ),
        Case(
            "gather_rows",
            {"row_ids": like(np.arange(TOKENS)), "out": floats(TOKENS, COLS)},
            lambda a: native.gather_rows(matrix, a["row_ids"], out=a["out"]),
            {"out"},
            free={"row_ids"},
        ),
    ]


def head_cases() -> list[Case]:
    shard, _ = quantised(normal(ROWS, COLS), "int8")
    size = native.cross_entropy_workspace_bytes("int8", TOKENS, ROWS, COLS)
    per_token = {name: floats(TOKENS) for name in ("running_max", "running_sum", "target_logit")}
    gradient = {"grad": floats(TOKENS, COLS), "target_row": floats(TOKENS, COLS)}
    workspace = aligned((size,), np.uint8)
    update = {
        "hidden": floats(TOKENS, COLS),
        "targets": like(np.arange(TOKENS)),
        **per_token,
        **gradient,
        "workspace": workspace,
    }
    finish = {
        **{name: like(array) for name, array in {**per_token, **gradient}.items()},
        "token_weight": floats(TOKENS),
        "loss_out": floats(TOKENS),
    }
    return [
        Case(
            "cross_entropy_update",
            update,
            lambda a: native.cross_entropy_update(
                shard, 0, a["hidden"], a["targets"], activation="f32", **{k: a[k] for k in update if k not in _FIRST}
            ),
            {*per_token, *gradient, "workspace"},
            minimum={"workspace"},
        ),
        Case(
            "cross_entropy_finish",
            finish,
            lambda a: native.cross_entropy_finish(**a),
            {"loss_out", "grad"},
            free={"running_max", "grad"},
        ),
    ]


_FIRST = ("hidden", "targets")


def boundary_cases() -> list[Case]:
    record = native.record_bytes("int8", COLS)
    adapter = {
        "adapter down_weight": floats(3, COLS),
        "adapter down_bias": floats(3),
        "adapter up_weight": floats(COLS, 3),
        "adapter up_bias": floats(COLS),
    }
    return [
        Case(
            "boundary_encode[adapter]",
            {"hidden": floats(TOKENS, COLS), **adapter, "out": aligned((TOKENS, record), np.uint8)},
            lambda a: native.boundary_encode(
                a["hidden"], adapter=tuple(a[name] for name in adapter), cache_format="int8", out=a["out"]
            ),
            {"out"},
            free={"hidden", "adapter down_weight"},
        ),
        Case(
            "boundary_encode",
            {"hidden": floats(TOKENS, COLS), "out": aligned((TOKENS, record), np.uint8)},
            lambda a: native.boundary_encode(a["hidden"], adapter=None, cache_format="int8", out=a["out"]),
            {"out"},
            free={"hidden"},
        ),
        Case(
            "boundary_decode",
            {
                "records": aligned((TOKENS, record), np.uint8),
                "out_rows": like(np.arange(TOKENS)),
                "out": floats(TOKENS, COLS),
            },
            lambda a: native.boundary_decode(a["records"], a["out_rows"], cache_format="int8", out=a["out"]),
            {"out"},
            free={"out"},
        ),
    ]


CASES = linear_cases() + quant_cases() + head_cases() + boundary_cases()


def wrong_dtype(array: NDArray) -> NDArray:
    return aligned(array.shape, np.float64 if array.dtype != np.float64 else np.float32)


def wrong_rank(array: NDArray) -> NDArray:
    return array[None]


def wrong_size(array: NDArray) -> NDArray:
    return aligned((*array.shape[:-1], array.shape[-1] - 1), array.dtype)


def strided(array: NDArray) -> NDArray:
    return aligned((*array.shape, 2), array.dtype)[..., 0]


def misaligned(array: NDArray) -> NDArray:
    return aligned(array.shape, array.dtype, shift=1)


MUTATIONS: dict[str, Callable[[NDArray], Any]] = {
    "dtype": wrong_dtype,
    "rank": wrong_rank,
    "size": wrong_size,
    "strided": strided,
    "misaligned": misaligned,
    "not_an_array": lambda array: array.tolist(),
    "other_device": lambda array: torch.empty(array.shape, device="meta"),
    "requires_grad": lambda array: torch.zeros(array.shape, requires_grad=True),
}


def applies(case: Case, name: str, mutation: str) -> bool:
    if mutation == "rank":
        return name not in case.flat
    if mutation == "size":
        return name not in case.free
    if mutation == "misaligned":  # bytes lie anywhere, except where whole cache lines are promised
        return case.arrays[name].dtype.itemsize > 1 or name in {"workspace", "codes"}
    return True


CALLS = [
    pytest.param(case, name, mutation, id=f"{case.name}-{name}-{mutation}")
    for case in CASES
    for name in case.arrays
    for mutation in MUTATIONS
    if applies(case, name, mutation)
]


def refuse(case: Case, arguments: dict[str, Any], name: str) -> None:
    before = {key: array.tobytes() for key, array in case.arrays.items()}
    with pytest.raises(InvalidArgument) as error:
        case.call(arguments)
    assert str(error.value).startswith(f"{case.function()}: ")
    assert name in str(error.value)
    assert before == {key: array.tobytes() for key, array in case.arrays.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_unchanged_call_works(case: Case) -> None:
    case.call({name: like(array) for name, array in case.arrays.items()})


@pytest.mark.parametrize(("case", "name", "mutation"), CALLS)
def test_a_wrong_array_is_refused_by_name(case: Case, name: str, mutation: str) -> None:
    refuse(case, {**case.arrays, name: MUTATIONS[mutation](case.arrays[name])}, name)


@pytest.mark.parametrize(
    ("case", "name"), [pytest.param(c, n, id=f"{c.name}-{n}") for c in CASES for n in sorted(c.outputs)]
)
def test_a_read_only_output_is_refused_by_name(case: Case, name: str) -> None:
    frozen = like(case.arrays[name])
    frozen.flags.writeable = False
    refuse(case, {**case.arrays, name: frozen}, name)
    refuse(case, {**case.arrays, name: memoryview(frozen)}, name)


@pytest.mark.parametrize(
    ("case", "output", "other"),
    [
        pytest.param(case, output, other, id=f"{case.name}-{output}-{other}")
        for case in CASES
        for output in sorted(case.outputs)
        for other in case.arrays
        if other != output
    ],
)
def test_an_output_that_shares_memory_is_refused_by_name(case: Case, output: str, other: str) -> None:
    sizes = [case.arrays[name].nbytes for name in (output, other)]
    memory = aligned((max(sizes),), np.uint8)
    shared = {
        name: memory[:size].view(case.arrays[name].dtype) for name, size in zip((output, other), sizes, strict=True)
    }
    shared = {name: array.reshape(case.arrays[name].shape) for name, array in shared.items()}
    shared[other][...] = case.arrays[other]  # valid indices, where they are indices
    refuse(case, {**case.arrays, **shared}, "must not share memory")


def test_an_output_that_shares_memory_with_the_matrix_is_refused() -> None:
    codes = aligned((ROWS, COLS), np.float32)
    matrix = native.Matrix.from_arrays(codes, None, block_format="f32", num_rows=ROWS, num_cols=COLS)
    with pytest.raises(InvalidArgument, match="out must not share memory with matrix"):
        native.dequantize_rows(matrix, 0, ROWS, out=codes)


def test_a_matrix_keeps_its_arrays_alive() -> None:
    def make() -> native.Matrix:
        return native.Matrix.from_arrays(
            np.full((ROWS, COLS), 7, np.float32), None, block_format="f32", num_rows=ROWS, num_cols=COLS
        )

    matrix = make()
    np.zeros((ROWS, COLS), np.float32)
    out = np.empty((ROWS, COLS), np.float32)
    native.dequantize_rows(matrix, 0, ROWS, out=out)
    assert (out == 7).all()


def test_the_message_says_what_was_expected_and_what_came() -> None:
    matrix, _ = quantised(normal(ROWS, COLS), "int4")
    workspace = aligned((native.linear_forward_workspace_bytes("int4", 2, ROWS, COLS),), np.uint8)
    with pytest.raises(InvalidArgument) as error:
        native.linear_forward(
            matrix, floats(2, COLS), None, activation="int8", out=floats(2, ROWS - 1), workspace=workspace
        )
    assert str(error.value) == (
        "linear_forward: out must be float32 [2, 24], C-contiguous on the CPU, got float32 [2, 23]"
    )


@pytest.mark.parametrize("source", ["torch", "buffer"])
def test_other_exporters_are_read_in_place(source: str) -> None:
    matrix, weight = quantised(normal(ROWS, COLS), "int4")
    if source == "torch":
        out: Any = torch.empty(ROWS, COLS)
        native.dequantize_rows(matrix, 0, ROWS, out=out)
    else:
        array = np.empty((ROWS, COLS), np.float32)
        native.dequantize_rows(matrix, 0, ROWS, out=memoryview(array))
        out = array
    np.testing.assert_allclose(np.asarray(out), weight, rtol=1e-6, atol=1e-7)
