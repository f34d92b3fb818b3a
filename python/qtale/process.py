"""The memory of this process: what it holds, and giving back what it has freed."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# glibc takes no larger threshold.
_LEAST_BYTES, _MOST_BYTES = 8 << 20, 32 << 20
_KEPT_BYTES = 16 << 20
_ROLLUP = Path("/proc/self/smaps_rollup")


def release() -> None:
    """Return freed memory to the system; glibc's allocator keeps it otherwise."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))


def return_large_blocks(over: int) -> None:
    """From now on give memory blocks of more than ``over`` bytes back to the system as they are freed.

    glibc's allocator keeps those of up to 32 MiB after it has seen one freed, and the matrices of a solver then leave
    holes between each other. What comes and goes with every batch should be smaller than ``over``, which is taken as
    8 MiB at least and 32 at most: fresh memory costs time.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(ctypes.c_int(_M_MMAP_THRESHOLD), ctypes.c_int(min(max(over, _LEAST_BYTES), _MOST_BYTES)))
            mallopt(ctypes.c_int(_M_TRIM_THRESHOLD), ctypes.c_int(_KEPT_BYTES))


def resident_bytes() -> int | None:
    """Bytes of this process that lie in main memory; None where the system does not say (it is Linux that does)."""
    try:
        lines = _ROLLUP.read_text().splitlines()
    except OSError:
        return None
    fields = (line.split() for line in lines)
    return next((int(parts[1]) << 10 for parts in fields if parts[0] == "Rss:"), None)
