"""No AVX instruction outside the files named for it: the core must start on any x86-64 CPU.

Reads the static library of a build in the source tree (build/libchainfed_core.a or build/release/): every object of it
and, of `_native`, nothing, since it only adds bind/ to these objects.
"""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHIVES = [ROOT / "build" / "libchainfed_core.a", ROOT / "build" / "release" / "libchainfed_core.a"]
SUFFIXES = re.compile(r"_(avx2|avx512vnni)\.cpp\.o$")
MEMBER = re.compile(r"^(\S+\.o):\s+file format")
# A wide register, or a VEX/EVEX mnemonic on xmm (all start with v; no legacy SSE mnemonic does).
AVX = re.compile(r"%[yz]mm\d|%k[0-7]\b|\tv[a-z]+\w*\s+.*%xmm")


def disassembly() -> str:
    archives = [path for path in ARCHIVES if path.exists()]
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no AVX files on this machine")
    if not archives or shutil.which("objdump") is None:
        pytest.skip("needs objdump and a CMake build in build/ (see CONTRIBUTING.md)")
    newest = max(archives, key=lambda path: path.stat().st_mtime)
    run = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(newest)], capture_output=True, text=True, timeout=300, check=True
    )
    return run.stdout


def test_avx_stays_in_the_files_named_for_it() -> None:
    member = ""
    members_with_avx: set[str] = set()
    members: set[str] = set()
    for line in disassembly().splitlines():
        if found := MEMBER.match(line):
            member = found.group(1)
            members.add(member)
        elif AVX.search(line):
            members_with_avx.add(member)
    assert {name for name in members_with_avx if not SUFFIXES.search(name)} == set()
    # The scan sees what it should: each suffixed file does use AVX.
    assert {name for name in members if SUFFIXES.search(name)} == members_with_avx


def test_files_for_one_level_export_no_inline_functions() -> None:
    """A weak (inline or template) symbol in a suffixed file could be the copy that the linker keeps for all."""
    archives = [path for path in ARCHIVES if path.exists()]
    if not archives or shutil.which("nm") is None:
        pytest.skip("needs nm and a CMake build in build/ (see CONTRIBUTING.md)")
    newest = max(archives, key=lambda path: path.stat().st_mtime)
    run = subprocess.run(["nm", "-C", str(newest)], capture_output=True, text=True, timeout=120, check=True)
    member, weak = "", []
    for line in run.stdout.splitlines():
        if line.endswith(".o:"):
            member = line[:-1]
        elif SUFFIXES.search(member) and re.search(r"^[0-9a-f]* [WV] ", line):
            weak.append(f"{member}: {line}")
    assert weak == []
