"""Byte sizes as people write them: `parse_size("512MiB")` -> 536870912, `format_size(536870912)` -> "512.0 MiB".

Decimal units (kB, MB, GB, TB) are powers of 1000 and binary units (KiB, MiB, GiB, TiB) powers of 1024, in any letter
case; a bare number is bytes. A bare letter ("512M") is refused, because tools disagree on what it means.
"""

import re

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(size: int | str) -> int:
    """Bytes meant by a number or by text such as `512MiB`, `1GB`, `1.5 GiB`. Raises ValueError."""
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise ValueError(f"expected a size of at least 0 bytes, got {size}")
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"expected a size in bytes such as 536870912, 512MiB or 1GB, got {size!r}")
    unit = _UNITS[match[2].lower()]
    return round(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def format_size(num_bytes: int) -> str:
    """The size with one decimal in the largest binary unit that keeps it at 1 or more: `1.5 GiB`, `812 B`."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{num_bytes} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
