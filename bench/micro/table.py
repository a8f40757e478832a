"""The goals of the kernels and the table that holds measured ratios against them."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

# (kernel, peer, reach, dream): the median ratio over shapes
GOALS: tuple[tuple[str, str, float, float], ...] = (
    ("int4_forward", "torch_fp32", 2.0, 3.0),
    ("int4_forward", "fbgemm_int8", 1.0, 1.4),
    ("int4_forward", "bitsandbytes_nf4", 2.0, 3.0),
    ("nf4_forward", "bitsandbytes_nf4", 2.0, 3.0),
    ("nf4_forward", "torch_fp32", 1.6, 2.0),
    ("nf4_forward", "fbgemm_int8", 1.0, 1.4),
    ("int4_grad_input", "torch_fp32", 0.9, 1.2),
    ("nf4_grad_input", "torch_fp32", 0.9, 1.2),
    ("linear_cross_entropy", "torch_fp32", 1.1, 2.0),
    ("linear_cross_entropy_real", "torch_fp32", 1.5, 3.0),
    ("boundary_encode", "memcpy", 0.5, 0.8),
    ("boundary_encode", "memcpy_rows", 0.5, 0.8),
    ("boundary_gather", "memcpy", 0.5, 0.8),
    ("boundary_gather", "memcpy_rows", 0.5, 0.8),
)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: one line a goal, with median, least and greatest ratio over the shapes that were run."""
    found = list(rows)
    lines = [
        "| kernel | compared with | median | least | greatest | shapes | share of peak | peak MiB | reach | dream | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kernel, peer, reach, dream in GOALS:
        mine = [row for row in found if row["kernel"] == kernel and row["peer"] == peer]
        if not mine:
            continue
        lines.append(_line(kernel, peer, mine, reach, dream))
    return "\n".join(lines)


def _line(kernel: str, peer: str, rows: list[Mapping[str, Any]], reach: float, dream: float) -> str:
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    if not ratios:
        return f"| {kernel} | {peer} | not run: {rows[0]['missing']} | | | 0 | | | {reach} | {dream} | |"
    median = statistics.median(ratios)
    share = statistics.median(row["share_of_peak"] for row in rows)
    peak_mib = max(row["peak_bytes"] for row in rows) / 2**20
    verdict = "dream" if median >= dream else "reach" if median >= reach else "short"
    return (
        f"| {kernel} | {peer} | {median:.2f} | {min(ratios):.2f} | {max(ratios):.2f} | {len(ratios)} | {share:.2f} "
        f"| {peak_mib:.1f} | {reach} | {dream} | {verdict} |"
    )
