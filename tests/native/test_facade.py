"""The facade: every name of the stub exists, with the stub's parameters, and a missing or foreign core says so."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chainfed_engine import _version, native

STUB = Path(native.__file__).with_name("_native.pyi")


def stub_functions() -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.FunctionDef)}


def stub_classes() -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef)}


def parameters(node: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in node.args.args + node.args.kwonlyargs if argument.arg != "self"]


@pytest.mark.parametrize("name", sorted(stub_functions()))
def test_functions_have_the_parameters_of_the_stub(name: str) -> None:
    # pybind11 writes the signature into the first line of the docstring.
    signature = (getattr(native, name).__doc__ or "").splitlines()[0]
    inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    names = re.findall(r"(?:^|, )(\w+):", inside)
    assert names == parameters(stub_functions()[name])


@pytest.mark.parametrize("name", sorted(stub_classes()))
def test_classes_have_the_methods_of_the_stub(name: str) -> None:
    methods = [node.name for node in stub_classes()[name].body if isinstance(node, ast.FunctionDef)]
    assert [method for method in methods if not hasattr(getattr(native, name), method)] == []


def test_nothing_public_is_missing_from_the_stub() -> None:
    module = importlib.import_module("chainfed_engine.native._native")
    public = {name for name in vars(module) if not name.startswith("_")}
    assert public == set(stub_functions()) | set(stub_classes())
    assert native.__version__ == _version.__version__


@pytest.mark.parametrize("fault", ["missing", "version"])
def test_a_missing_or_foreign_core_says_how_to_build(fault: str) -> None:
    setup = {
        "missing": "sys.modules['chainfed_engine.native._native'] = None",
        "version": "import chainfed_engine._version as v; v.__version__ = '9.9.9'",
    }[fault]
    code = f"import sys\n{setup}\nimport chainfed_engine.native"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode != 0
    assert "NativeUnavailable" in run.stderr
    assert "pip install ." in run.stderr


def test_the_environment_forces_the_level_down() -> None:
    code = "from chainfed_engine import native; print(native.simd_level())"
    for level in native.simd_levels():
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={"CHAINFED_SIMD": level, "PYTHONPATH": str(Path(native.__file__).parents[2])},
        )
        assert run.stdout.strip() == level
