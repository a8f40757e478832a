"""The switches of the CUDA backend in CMake: what is refused in which words, and that the core and `_native` are
compiled and linked by the same commands with and without it. Only configures; a script stands in for nvcc where it can.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "native"))
from ptxas import find_nvcc

ROOT = Path(__file__).parents[2]


def configure(build: Path, *, python: bool = False, nvcc: str | None = None, **options: str) -> tuple[int, str]:
    """Exit status and output of one configuration; `nvcc`: the text of a script, None for whatever is installed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CHAINFED_")}
    if nvcc is not None:
        home = build.parent / "cuda_home"
        (home / "bin").mkdir(parents=True, exist_ok=True)
        (home / "bin" / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (home / "bin" / "nvcc").chmod(0o755)
        environment["CUDA_HOME"] = str(home)
    command = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-UCHAINFED_NVCC",
        f"-DCHAINFED_PYTHON={'ON' if python else 'OFF'}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCHAINFED_MODULE_DIR={build}/module", *(f"-D{name}={value}" for name, value in options.items()),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    return run.returncode, " ".join((run.stdout + run.stderr).split())


BROKEN = "echo \"nvcc fatal : Unsupported gpu architecture 'compute_90'\"; exit 1"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cmake") / "build"  # one for all: the compiler is looked at once


def test_cuda_that_is_required_and_cannot_be_built_says_what_to_do(build: Path) -> None:
    status, output = configure(build, nvcc=BROKEN, CHAINFED_CUDA="1", CHAINFED_CUDA_ARCHITECTURES="")
    assert status != 0
    assert "CHAINFED_CUDA=1:" in output and "Unsupported gpu architecture" in output
    assert "CHAINFED_CUDA_ARCHITECTURES, or build for the CPU alone with CHAINFED_CUDA=0" in output


def test_cuda_that_is_not_required_is_left_out_with_a_word(build: Path) -> None:
    status, output = configure(build, nvcc=BROKEN, CHAINFED_CUDA="auto", CHAINFED_CUDA_ARCHITECTURES="")
    assert status == 0
    assert "CUDA backend: not built" in output and "Unsupported gpu architecture" in output


def test_without_cuda_nvcc_is_never_started(build: Path) -> None:
    mark = build.parent / "started"
    for choice in ("0", ""):
        status, _ = configure(build, nvcc=f"touch {mark}; exit 1", CHAINFED_CUDA=choice)
        assert (status, mark.exists()) == (0, False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"CHAINFED_CUDA": "yes"}, "CHAINFED_CUDA: expected 0, 1 or auto, got yes"),
        ({"CHAINFED_CUDA_ARCHITECTURES": "75"}, "expected numbers of 80 or above, such as 87, got 75"),
        ({"CHAINFED_CUDA_ARCHITECTURES": "sm_87"}, "expected numbers of 80 or above, such as 87, got sm_87"),
    ],
)
def test_wrong_switches_are_refused(build: Path, options: dict[str, str], words: str) -> None:
    status, output = configure(build, **{"CHAINFED_CUDA": "0", "CHAINFED_CUDA_ARCHITECTURES": "", **options})
    assert status != 0 and words in output


def test_the_default_architectures_are_asked_of_nvcc(build: Path) -> None:
    said = build.parent / "said"
    configure(build, nvcc=f'echo "$@" >{said}; exit 1', CHAINFED_CUDA="auto", CHAINFED_CUDA_ARCHITECTURES="")
    assert re.findall(r"code=sm_(\d+)", said.read_text()) == ["80", "87", "89", "90"]


def commands(build: Path) -> dict[str, str]:
    rows = json.loads((build / "compile_commands.json").read_text())
    return {row["file"].replace(str(build), "BUILD"): row["command"].replace(str(build), "BUILD") for row in rows}


def link_of(build: Path, target: str) -> list[str]:
    """The lines of build.ninja that say how a shared library is linked."""
    text = (build / "build.ninja").read_text().replace(str(build), "BUILD")
    start = re.search(rf"^build [^\n]*{target}[^\n]*: CXX_(SHARED|MODULE)_LIBRARY_LINKER", text, re.MULTILINE)
    assert start is not None
    return text[start.start() : text.index("\n\n", start.start())].splitlines()


@pytest.mark.timeout(600)
def test_the_core_is_built_by_the_same_commands_with_and_without_cuda(tmp_path: Path) -> None:
    if find_nvcc() is None:
        pytest.skip("needs nvcc on PATH, in CUDA_HOME or /usr/local/cuda")
    options = {"python": True, "CHAINFED_CUDA_ARCHITECTURES": "90"}
    without, with_cuda = tmp_path / "without", tmp_path / "with"
    for build, choice in ((without, "0"), (with_cuda, "1")):
        status, output = configure(build, CHAINFED_CUDA=choice, **options)  # type: ignore[arg-type]
        assert status == 0, output
    plain, more = commands(without), commands(with_cuda)
    assert len(plain) > 40
    assert {file: more.get(file) for file in plain} == plain
    assert all("/csrc/cuda/" in file for file in more.keys() - plain.keys())
    assert link_of(with_cuda, r"_native\.") == link_of(without, r"_native\.")
    libraries = next(line for line in link_of(with_cuda, "libchainfed_cuda") if "LINK_LIBRARIES" in line)
    assert "-lcudart_static" in libraries
    assert not re.search(r"-lcudart(\s|$)|-lcublas", libraries)  # nothing of CUDA is looked for when it is loaded


@pytest.mark.parametrize(("asked", "given"), [(None, "0"), ("1", "1"), ("auto", "auto")])
def test_pip_compiles_no_cuda_unless_it_is_asked_for(tmp_path: Path, asked: str | None, given: str) -> None:
    said, programs = tmp_path / "said", tmp_path / "bin"
    programs.mkdir()
    (programs / "cmake").write_text(f'#!/bin/sh\necho "$@" >>{said}\n')
    (programs / "cmake").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CHAINFED_")}
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    if asked is not None:
        environment["CHAINFED_CUDA"] = asked
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-temp",
        tmp_path / "temp",
        "--build-lib",
        tmp_path,
    ]
    subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, timeout=60, check=False)
    configure_line, build_line = said.read_text().splitlines()
    assert f"-DCHAINFED_CUDA={given} " in configure_line
    assert "--build" in build_line
