"""What nvcc's assembler says of every kernel: registers, spilled bytes, stack, for the architectures that matter most.

    python tests/native/ptxas.py            # compile csrc/cuda/*.cu and compare with csrc/cuda/ptxas.json
    python tests/native/ptxas.py --write    # renew the table after a change that is meant

A source's report is kept in build/ptxas/ under a hash of it, of all headers and of the compiler, so that only what
changed is compiled again.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
TABLE = SOURCES / "ptxas.json"
ARCHITECTURES = (87, 90)
# Another compiler allocates otherwise; what it may do without anybody looking at it.
OTHER_COMPILER_REGISTERS, OTHER_COMPILER_SPILL_BYTES = 32, 128

Report = dict[str, dict[str, dict[str, int]]]  # kernel -> "sm_87" -> registers, spill_bytes, stack_bytes

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\d+)'")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return shutil.which("nvcc") or next((f"{home}/bin/nvcc" for home in homes if Path(home, "bin/nvcc").exists()), None)


def compiler_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found.group(1) if found else "unknown"


def parse(text: str) -> Report:
    """The reports in the output of `nvcc -Xptxas -v`, by the kernels' names as the compiler mangled them."""
    report: Report = {}
    entry: dict[str, int] = {}
    for line in text.splitlines():
        if found := _ENTRY.search(line):
            entry = report.setdefault(found.group(1), {}).setdefault(found.group(2), {})
        elif found := _SPILL.search(line):
            entry["stack_bytes"], stores, loads = (int(part) for part in found.groups())
            entry["spill_bytes"] = max(stores, loads)
        elif found := _USED.search(line):
            entry["registers"] = int(found.group(1))
    return report


def compile_all(nvcc: str) -> Report:
    """Compile every source for ARCHITECTURES; raises RuntimeError with the compiler's words."""
    common = hashlib.sha256(compiler_version(nvcc).encode() + str(ARCHITECTURES).encode())
    for folder in ("cuda", "base", "boundary", "quant", "include/chainfed"):
        for path in sorted((ROOT / "csrc" / folder).glob("*.h")):
            common.update(path.name.encode() + path.read_bytes())
    kept = ROOT / "build" / "ptxas"
    kept.mkdir(parents=True, exist_ok=True)

    def reported(source: Path) -> Report:
        digest = common.copy()
        digest.update(source.name.encode() + source.read_bytes())
        file = kept / f"{source.stem}-{digest.hexdigest()[:16]}.json"
        if not file.exists():
            report = parse(_compile(nvcc, source, kept))
            for old in kept.glob(f"{source.stem}-*.json"):
                old.unlink()
            file.write_text(json.dumps(dict(zip(_demangled(list(report)), report.values(), strict=True))))
        return json.loads(file.read_text())  # type: ignore[no-any-return]

    report: Report = {}
    largest_first = sorted(SOURCES.glob("*.cu"), key=lambda source: not source.name.startswith("fused_"))
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for one in pool.map(reported, largest_first):
            report |= one
    return report


def _compile(nvcc: str, source: Path, folder: Path) -> str:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [
        nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", *codes, "-I", str(ROOT / "csrc/include"), "-I", str(ROOT / "csrc"),
        '-DCHAINFED_CUDA_ARCHITECTURES="87,90"', "-c", str(source), "-o", str(folder / f"{source.stem}.o"),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
    (folder / f"{source.stem}.o").unlink()
    return run.stderr


def _demangled(names: list[str]) -> list[str]:
    """Short readable names: MmaLinear<int4, grad, 4, 2, 2, 3>."""
    if not names:
        return []
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [_short(line) for line in text.splitlines()]


def _short(name: str) -> str:
    inner = name[name.index("run_kernel<") + 11 : name.rindex(">(")].removeprefix("chainfed::cuda::")
    for pattern, words in ((r"\(chainfed::BlockFormat\)(\d)", ("int4", "nf4", "int8")),
                           (r"\(chainfed::cuda::Direction\)(\d)", ("forward", "grad"))):  # fmt: skip
        inner = re.sub(pattern, lambda found, words=words: words[int(found.group(1))], inner)  # type: ignore[misc]
    return inner.strip()


def differences(report: Report, table: Report, *, same_compiler: bool) -> Iterable[str]:
    """One line for every kernel that is missing, new, or needs more than the table says (with another compiler: much
    more); with the same compiler also one that needs less, so that the table stays true."""
    for kernel in sorted(report.keys() | table.keys()):
        if kernel not in report or kernel not in table:
            yield f"{kernel}: {'not in the table' if kernel in report else 'in the table but not in the sources'}"
            continue
        for architecture, expected in table[kernel].items():
            got = report[kernel].get(architecture, {})
            if same_compiler:
                if got != expected:
                    yield f"{kernel} on {architecture}: table {expected}, got {got}"
                continue
            more = got.get("registers", 999) - expected["registers"]
            spilled = got.get("spill_bytes", 9999) - expected["spill_bytes"]
            if more > OTHER_COMPILER_REGISTERS or spilled > OTHER_COMPILER_SPILL_BYTES:
                yield f"{kernel} on {architecture}: table {expected}, got {got} from another compiler"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="renew csrc/cuda/ptxas.json")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc on PATH, in CUDA_HOME or /usr/local/cuda", file=sys.stderr)
        return 2
    report, version = compile_all(nvcc), compiler_version(nvcc)
    if options.write:
        rows = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps(report[name], sort_keys=True)}" for name in sorted(report)
        )
        TABLE.write_text(f'{{\n  "compiler": "{version}",\n  "kernels": {{\n{rows}\n  }}\n}}\n')
        return 0
    table = json.loads(TABLE.read_text())
    found = list(differences(report, table["kernels"], same_compiler=version == table["compiler"]))
    print("\n".join(found) or f"{len(report)} kernels as in {TABLE.name}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
