"""Wherever nvcc is: every CUDA source compiles for sm_87 and sm_90, and each kernel needs the registers, spills and
stack that csrc/cuda/ptxas.json says. The table and the comparison are also tested without nvcc.
"""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import ptxas


@pytest.mark.timeout(1200)  # 100 s of processor time when every source has changed
def test_every_kernel_is_as_in_the_table() -> None:
    nvcc = ptxas.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc on PATH, in CUDA_HOME or /usr/local/cuda")
    table = json.loads(ptxas.TABLE.read_text())
    same = ptxas.compiler_version(nvcc) == table["compiler"]
    report = ptxas.compile_all(nvcc)
    assert len(report) > 20
    found = list(ptxas.differences(report, table["kernels"], same_compiler=same))
    assert not found, "\n".join([*found, "if it is meant: python tests/native/ptxas.py --write"])


def test_no_kernel_spills_much_or_leaves_an_architecture_out() -> None:
    for kernel, rows in json.loads(ptxas.TABLE.read_text())["kernels"].items():
        assert set(rows) == {f"sm_{arch}" for arch in ptxas.ARCHITECTURES}, kernel
        for row in rows.values():
            assert row["registers"] <= 255 and row["spill_bytes"] <= 64, kernel


_OUTPUT = """
ptxas info    : Compiling entry function '_Zk' for 'sm_87'
ptxas info    : Function properties for _Zk
    64 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 456 bytes cmem[0]
"""


def test_a_report_is_read_and_differences_are_named() -> None:
    report = ptxas.parse(_OUTPUT)
    assert report == {"_Zk": {"sm_87": {"stack_bytes": 64, "spill_bytes": 28, "registers": 255}}}
    lean = {"_Zk": {"sm_87": {"stack_bytes": 0, "spill_bytes": 0, "registers": 250}}}
    assert list(ptxas.differences(report, report, same_compiler=True)) == []
    assert len(list(ptxas.differences(report, lean, same_compiler=True))) == 1
    assert list(ptxas.differences(report, lean, same_compiler=False)) == []
    assert "not in the table" in next(iter(ptxas.differences(report, {}, same_compiler=True)))
    assert "not in the sources" in next(iter(ptxas.differences({}, report, same_compiler=True)))
