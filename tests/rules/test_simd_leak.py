"""No instruction outside the files named for its level: the core must start on any CPU of its architecture.

Reads the static library of a build in the source tree: build/libchainfed_core.a or build/release/ on x86-64, and
build/aarch64/ where `make test-aarch64` has made it. `_native` only adds bind/ to these objects.
"""

import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
X86 = [ROOT / "build" / "libchainfed_core.a", ROOT / "build" / "release" / "libchainfed_core.a"]
ARM = [ROOT / "build" / "aarch64" / "libchainfed_core.a"]
MEMBER = re.compile(r"^(\S+\.o):\s+file format")
WIDE = re.compile(r"_(avx2|avx512vnni)\.cpp\.o$")
# A wide register, or a VEX/EVEX mnemonic on xmm (all start with v; no legacy SSE mnemonic does).
AVX = re.compile(r"%[yz]mm\d|%k[0-7]\b|\tv[a-z]+\w*\s+.*%xmm")
# What only EVEX can say: 512 bits, mask registers, the upper sixteen registers, rounding in the instruction.
EVEX = re.compile(r"%zmm\d|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b|\{r[nduz]-sae\}|\{sae\}|\tvpdp\w+")
# A sum over bytes (dotprod), a product of two-row matrices (i8mm, bf16).
DOT = re.compile(r"\t[us]u?dot\b")
MATRIX = re.compile(r"\t(u|s|us|bf)mmla\b")


def newest(archives: list[Path], tool: str) -> str:
    found = [path for path in archives if path.exists()]
    if not found or shutil.which(tool) is None:
        pytest.skip(f"needs {tool} and one of {', '.join(str(path.relative_to(ROOT)) for path in archives)}")
    return str(max(found, key=lambda path: path.stat().st_mtime))


@cache
def disassembly(archive: str, objdump: str) -> dict[str, list[str]]:
    """Instructions by member of the library."""
    run = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", archive], capture_output=True, text=True, timeout=300, check=True
    )
    members: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in run.stdout.splitlines():
        if found := MEMBER.match(line):
            lines = members.setdefault(found.group(1), [])
        else:
            lines.append(line)
    return members


def x86() -> dict[str, list[str]]:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no AVX files on this machine")
    return disassembly(newest(X86, "objdump"), "objdump")


def arm() -> dict[str, list[str]]:
    objdump = "objdump" if platform.machine() == "aarch64" else "aarch64-linux-gnu-objdump"
    return disassembly(newest(ARM, objdump), objdump)


def with_any(pattern: re.Pattern[str], members: dict[str, list[str]]) -> set[str]:
    return {name for name, lines in members.items() if any(pattern.search(line) for line in lines)}


def named(suffix: str, members: dict[str, list[str]]) -> set[str]:
    found = {name for name in members if re.search(rf"_({suffix})\.cpp\.o$", name)}
    assert found, f"no file of level {suffix}"
    return found


def test_avx_stays_in_the_files_named_for_it() -> None:
    # Equal, not below: the scan sees what it should, for each suffixed file does use AVX.
    assert with_any(AVX, x86()) == named("avx2|avx512vnni", x86())


def test_avx2_files_hold_nothing_that_needs_avx512() -> None:
    assert with_any(EVEX, x86()) == named("avx512vnni", x86())


def test_dot_products_stay_in_the_aarch64_files_named_for_them() -> None:
    assert with_any(DOT, arm()) == named("dotprod", arm())
    assert with_any(MATRIX, arm()) == named("i8mm", arm())


@pytest.mark.parametrize("architecture", ["x86", "arm"])
def test_files_for_one_level_export_no_inline_functions(architecture: str) -> None:
    """A weak (inline or template) symbol in a suffixed file could be the copy that the linker keeps for all."""
    archives, suffixes = (X86, WIDE) if architecture == "x86" else (ARM, re.compile(r"_(dotprod|i8mm)\.cpp\.o$"))
    run = subprocess.run(["nm", "-C", newest(archives, "nm")], capture_output=True, text=True, timeout=120, check=True)
    member, weak = "", []
    for line in run.stdout.splitlines():
        if line.endswith(".o:"):
            member = line[:-1]
        elif suffixes.search(member) and re.search(r"^[0-9a-f]* [WV] ", line):
            weak.append(f"{member}: {line}")
    assert weak == []
