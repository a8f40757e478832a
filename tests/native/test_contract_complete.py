"""The contract tests name every function of the core that takes an array; wrong scalars are refused as arrays are."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainfed_engine import native
from chainfed_engine.errors import InvalidArgument

sys.path.insert(0, str(Path(__file__).parent))
from arrays import aligned, normal, quantised
from test_contract import CASES

STUB = Path(native.__file__).with_name("_native.pyi")
# Tested where the files are that they need: tests/native/test_store.py, and for leases test_cuda_border.py.
ELSEWHERE = {"StoreReader.gather_rows", "Lease.copy_to", "Lease.matrix_in"}
HUGE = 1 << 62


def takes_an_array(function: ast.FunctionDef) -> bool:
    arguments = [*function.args.args, *function.args.kwonlyargs]
    return any(node.annotation is not None and "Array" in ast.unparse(node.annotation) for node in arguments)


def functions_with_arrays() -> set[str]:
    found = set()
    for node in ast.parse(STUB.read_text(encoding="utf-8")).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + n.name for n in members if isinstance(n, ast.FunctionDef) and takes_an_array(n)}
    return found


def test_every_function_that_takes_an_array_has_a_case() -> None:
    assert {case.function() for case in CASES} | ELSEWHERE == functions_with_arrays()


def test_gather_rows_of_a_store_refuses_what_gather_rows_refuses(tmp_path: Path) -> None:
    payload = np.ones((8, 16), np.float32).tobytes()
    path = tmp_path / "one.safetensors"
    path.write_bytes(bytes(4096) + payload)
    tensor = ("w", "f32", 8, 16, 4096, len(payload), 0, 0)
    reader = native.StoreReader([(str(path), 4096 + len(payload), [tensor])], num_slots=1)
    ids, out = np.array([7, 0]), aligned((2, 16), np.float32)
    for wrong in (aligned((2, 16), np.float64), aligned((3, 16), np.float32), aligned((2, 32), np.float32)[:, ::2]):
        with pytest.raises(InvalidArgument, match="out"):
            reader.gather_rows(0, "w", ids, out=wrong)
    for bad in (np.array([8]), np.array([-1]), np.array([0.0]), np.array([[0]])):
        with pytest.raises(InvalidArgument, match=r"row.id"):
            reader.gather_rows(0, "w", bad, out=out[:1])
    assert (out == 0).all()
    reader.gather_rows(0, "w", ids, out=out)
    assert (out == 1).all()
    reader.close()


def forward(**changed: Any) -> None:
    matrix, _ = quantised(normal(8, 32), "int4")
    size = native.linear_forward_workspace_bytes("int4", 2, 8, 32)
    given = {"activation": "int8", "out": aligned((2, 8), np.float32), "workspace": aligned((size,), np.uint8)}
    native.linear_forward(matrix, aligned((2, 32), np.float32), None, **{**given, **changed})


def from_arrays(**changed: Any) -> None:
    given = {"block_format": "int4", "num_rows": 8, "num_cols": 32}
    native.Matrix.from_arrays(aligned((128,), np.uint8), aligned((16,), np.float16), **{**given, **changed})


WRONG_SCALARS: dict[str, Callable[[], object]] = {
    "activation": lambda: forward(activation="int9"),
    "block_format": lambda: from_arrays(block_format="int5"),
    "num_rows": lambda: from_arrays(num_rows=0),
    "num_cols": lambda: from_arrays(num_cols=-32),
    "overflow": lambda: from_arrays(num_rows=HUGE, num_cols=HUGE),
    "codes_bytes": lambda: native.codes_bytes("int4", -1, 32),
    "scales_bytes": lambda: native.scales_bytes("nf4", HUGE, HUGE),
    "forward workspace": lambda: native.linear_forward_workspace_bytes("int4", -1, 8, 32),
    "forward workspace overflow": lambda: native.linear_forward_workspace_bytes("int4", 1, 8, HUGE),
    "grad workspace": lambda: native.linear_grad_input_workspace_bytes("int4", 1, 0, 32),
    "head workspace": lambda: native.cross_entropy_workspace_bytes("int8", 1, 8, -4),
    "record": lambda: native.record_bytes("int8", 0),
    "cache_format": lambda: native.record_bytes("int7", 64),
    "row range": lambda: native.dequantize_rows(quantised(normal(8, 32), "int4")[0], 4, 3, out=aligned((1, 32), "f4")),
    "row range beyond": lambda: native.dequantize_rows(
        quantised(normal(8, 32), "int4")[0], 0, 9, out=aligned((9, 32), "f4")
    ),
}


@pytest.mark.parametrize("name", WRONG_SCALARS)
def test_a_wrong_number_or_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        WRONG_SCALARS[name]()
