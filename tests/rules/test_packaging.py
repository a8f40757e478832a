"""An sdist made without git holds all that a build and its tests need, and nothing that was built."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.egg-info", "__pycache__", "_build")
EXTENSIONS = (".py", ".pyi", ".cpp", ".h", ".cu", ".css", ".toml", ".cmake", ".md", ".txt")


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names inside the archive, without its top folder."""
    folder = tmp_path_factory.mktemp("sdist")
    ignore: Callable[..., set[str]] = NOT_SOURCE
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)],
        cwd=folder / "source",
        env={**os.environ, "GIT_DIR": str(folder / "no-git")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "license" in made.stderr and made.returncode:  # an older setuptools than [build-system] asks for
        pytest.skip("needs setuptools 77 or newer")
    assert made.returncode == 0, made.stderr[-2000:]
    with tarfile.open(folder / made.stdout.splitlines()[-1]) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.mark.parametrize("folder", ["chainfed_engine", "csrc", "cmake", "tests", "docs", "examples", "bench"])
def test_every_source_file_is_in_the_sdist(sdist: set[str], folder: str) -> None:
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.suffix in EXTENSIONS and not {"__pycache__", "_build"} & set(path.parts)
    }
    assert wanted and wanted <= sdist, sorted(wanted - sdist)[:5]


def test_nothing_built_is_in_the_sdist(sdist: set[str]) -> None:
    assert not [name for name in sdist if name.endswith((".so", ".pyc", ".o"))]
    top = {"CMakeLists.txt", "LICENSE", "README.md", "CITATION.cff", "CHANGELOG.md", "Makefile", "constraints.txt"}
    assert top <= sdist


def test_a_build_needs_no_torch_and_a_wheel_holds_types_and_data() -> None:
    document = project()
    requires = document["build-system"]["requires"]  # type: ignore[index]
    assert not [name for name in requires if name.startswith(("torch", "transformers", "numpy"))]
    patterns = document["tool"]["setuptools"]["package-data"]["*"]  # type: ignore[index]
    data = [
        path for path in (ROOT / "chainfed_engine").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    for path in data:
        if path.suffix not in (".py", ".so"):
            assert any(path.match(pattern) for pattern in patterns), f"{path.name}: in no pattern of package-data"
    assert (ROOT / "chainfed_engine" / "py.typed").exists()


def test_the_version_is_one() -> None:
    from chainfed_engine import __version__

    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
