"""Sizes in bytes as people write and read them."""

from __future__ import annotations

import re
from fractions import Fraction

from qtale.errors import InputError

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"(\d{1,19}(?:\.\d{1,19})?) ?([A-Za-z]+)", re.ASCII)
_MOST = 2**63 - 1


def parse_size(text: str, what: str = "size") -> int:
    """Bytes of ``6GiB``, ``1.5 MB``, ``4096 B``; units are B, KiB, MiB, GiB (1024) and KB, MB, GB (1000).

    Fractions of a byte are dropped. ``what`` names the value in the InputError that everything else gets.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = UNITS.get(match.group(2)) if match else None
    if match is None or unit is None:
        raise InputError(f"{what} {text!r} is no size; write a number and a unit of {', '.join(UNITS)}, such as 6GiB.")
    count = int(Fraction(match.group(1)) * unit)
    if count > _MOST:
        raise InputError(f"{what} {text!r} is more than any machine has; the most is {_MOST} B.")
    return count


def human_bytes(count: int) -> str:
    """A size in binary units: ``1536`` → ``1.5 KiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
