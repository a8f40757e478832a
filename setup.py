"""Builds the native module with CMake. Everything else about the package stands in pyproject.toml.

`pip install .` configures CMakeLists.txt in the temporary build folder and places `_native` beside the package's
`native/__init__.py` (in the source tree for `pip install -e .`). CHAINFED_BUILD_DIR names a build folder to share with
`cmake --build`. Torch is not needed to build. The CUDA backend takes longer to compile than all the rest: it is built
where CHAINFED_CUDA=1 (or auto: if nvcc works) stands in the environment; CHAINFED_CUDA_ARCHITECTURES=87 says for which
devices (cmake/cuda.cmake).
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_TARGETS = ("--target", "_native", "chainfed_module")  # the second: the CUDA library, where it is built
_CUDA_CHOICES = {"CHAINFED_CUDA": "0", "CHAINFED_CUDA_ARCHITECTURES": ""}


class CMakeBuild(build_ext):
    """One CMake configure and build in place of setuptools' compiler calls."""

    def build_extension(self, ext: Extension) -> None:
        source_dir = Path(__file__).resolve().parent
        module_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(os.environ.get("CHAINFED_BUILD_DIR") or Path(self.build_temp) / "cmake").resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            *("-S", str(source_dir), "-B", str(build_dir), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCHAINFED_MODULE_DIR={module_dir}",
            "-DCHAINFED_TESTS=OFF",
            *(f"-D{name}={os.environ.get(name, default)}" for name, default in _CUDA_CHOICES.items()),
        ]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(min(4, os.cpu_count() or 1)))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir), *_TARGETS, "--parallel", jobs], check=True)


setup(
    ext_modules=[Extension("chainfed_engine.native._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
