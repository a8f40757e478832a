"""What a results file says of the goals, of what was calculated before, and of the crossovers in csrc/cuda/crossover.h.

python bench/cuda/summary.py results.jsonl      # exit code 1 when a check failed or a part is missing
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GB = 1e9


def _ratios(rows: Iterable[Row], wanted: Callable[[int], bool]) -> list[float]:
    """Of int4's forward products, whose tokens are wanted: torch's bf16 time over ours."""
    return [
        float(row["ratio"])
        for row in rows
        if row.get("what") == "linear forward" and row.get("block_format") == "int4" and wanted(row["tokens"])
    ]


def _of(rows: Iterable[Row], what: str, name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get("what") == what and name in row]


def goals(rows: list[Row]) -> list[tuple[str, float | None, float, str, str]]:
    """Name, the worst value measured (None: not measured), the goal, how they compare, what was calculated for H100."""

    def worst(values: list[float], compare: str) -> float | None:
        return None if not values else min(values) if compare == ">=" else max(values)

    step = "window step of the 8B shape"
    peaks = [value / GB for value in _of(rows, step, "peak_reserved_bytes")]
    workspaces = [value / 2**20 for value in _of(rows, "head with gradient", "workspace_bytes")]
    return [
        ("forward, 64 tokens, of bf16", worst(_ratios(rows, lambda m: m == 64), ">="), 2.0, ">=", "1.1 to 1.9"),
        ("forward, 1024, of bf16", worst(_ratios(rows, lambda m: m == 1024), ">="), 0.9, ">=", "0.73 to 0.79"),
        ("forward, 2048 and more", worst(_ratios(rows, lambda m: m >= 2048), ">="), 0.9, ">=", "0.79 to 0.90"),
        ("head, of bf16", worst(_of(rows, "head with gradient", "ratio"), ">="), 1.5, ">=", "1.0"),
        ("head, workspace, MiB", worst(workspaces, "<="), 64, "<=", "64"),
        ("window step, of its limit", worst(_of(rows, step, "of_limit"), ">="), 0.8, ">=", ""),
        ("window step, peak, GB", worst(peaks, "<="), 1.5, "<=", ""),
    ]  # fmt: skip


def crossovers(rows: list[Row]) -> list[str]:
    """What was measured, a matrix and direction a line, beside what the build uses."""
    measured = [row for row in rows if row.get("kind") == "crossover"]
    if not measured:
        return ["crossover: not measured"]
    device = next((row["device"] for row in rows if row.get("kind") == "machine"), {})
    used = device.get("library_from_tokens")
    lines = [f"crossover to cuBLASLt: used from {used} tokens (csrc/cuda/crossover.h); measured from"]
    for row in measured:
        shape = "x".join(str(size) for size in row["matrix"])
        lines.append(f"  {row['library_from_tokens']!s:>6}  {row['block_format']} {shape} {row['direction']}")
    known = [row["library_from_tokens"] for row in measured if row["library_from_tokens"] is not None]
    middle = "never" if 2 * len(known) < len(measured) else f"{statistics.median(known):.0f}"
    lines.append(f"  median {middle}: the row for sm_{device.get('architecture')} in crossover.h")
    return lines


def summary(rows: list[Row]) -> tuple[list[str], bool]:
    """Lines for people, and whether all is there and right."""
    checks = [row for row in rows if row.get("kind") == "check"]
    failed = [f"check failed: {row['name']}: {row.get('problem')}" for row in checks if not row["ok"]]
    failed += [
        f"{row.get('what')}: {row['problem']}" for row in rows if row.get("kind") != "check" and "problem" in row
    ]
    failed += [] if checks else ["no check ran to its end"]
    lines = [f"{len(checks) - sum(not row['ok'] for row in checks)} of {len(checks)} checks hold", *failed]
    lines += [f"left out: {row['left_out']}" for row in rows if "left_out" in row]
    for name, value, goal, compare, calculated in goals(rows):
        met = value is not None and (value >= goal if compare == ">=" else value <= goal)
        said = "not measured" if value is None else f"{value:.2f} {'meets' if met else 'MISSES'}"
        before = f" (calculated for H100: {calculated})" if calculated else ""
        lines.append(f"{name:<28} {said} {compare} {goal}{before}")
    return lines + crossovers(rows), not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    rows = [json.loads(line) for line in parser.parse_args().results.read_text().splitlines()]
    lines, right = summary(rows)
    print("\n".join(lines))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
