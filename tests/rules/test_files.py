"""What holds for every source file: short enough to be read at once, and nothing that would run bytes from disk."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_PYTHON_LINES, MAX_CPP_LINES, MAX_FUNCTION_LINES = 400, 500, 60
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
TORCH_PICKLERS = {"torch.load", "torch.save", "torch.jit.load"}


def _files(*endings: str, under: tuple[str, ...]) -> list[Path]:
    found = [path for folder in under for ending in endings for path in (ROOT / folder).rglob(f"*{ending}")]
    return sorted(path for path in found if "__pycache__" not in path.parts)


PYTHON = _files(".py", under=("chainfed_engine", "tests", "bench"))
ENGINE = _files(".py", under=("chainfed_engine",))
CPP = _files(".h", ".cpp", ".cu", ".cuh", under=("csrc", "tests"))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_files_to_look_at() -> None:
    assert len(ENGINE) > 20 and len(CPP) > 10


@pytest.mark.parametrize("path", PYTHON, ids=_name)
def test_python_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_PYTHON_LINES


@pytest.mark.parametrize("path", CPP, ids=_name)
def test_cpp_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_CPP_LINES


@pytest.mark.parametrize("path", ENGINE, ids=_name)
def test_python_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", PYTHON, ids=_name)
def test_nothing_is_pickled(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & PICKLERS
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in PICKLERS
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in TORCH_PICKLERS
            assert not any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords)
