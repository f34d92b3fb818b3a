"""The memory of this process: what it holds, and giving back what it has freed."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_ROLLUP = Path("/proc/self/smaps_rollup")


def release() -> None:
    """Return freed memory to the system; glibc's allocator keeps it otherwise."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))


def resident_bytes() -> int | None:
    """Bytes of this process that lie in main memory; None where the system does not say (it is Linux that does)."""
    try:
        lines = _ROLLUP.read_text().splitlines()
    except OSError:
        return None
    fields = (line.split() for line in lines)
    return next((int(parts[1]) << 10 for parts in fields if parts[0] == "Rss:"), None)
