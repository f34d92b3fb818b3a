"""What the kernels' benchmarks share: memory in huge pages."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np

ALIGNMENT = 64
HUGE_PAGE = 2 << 20

Array = np.ndarray[Any, Any]


def huge_array(size: int) -> Array:
    """``size`` bytes of touched memory that begin on a huge page, in huge pages where the system grants them."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # Python's default is shared memory, which gets no huge pages
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    start = -array.ctypes.data % HUGE_PAGE
    array = array[start : start + size]
    array.fill(0)
    return array


def huge_share(array: Array) -> float | None:
    """Part of the array's mapping that lies in huge pages, by /proc/self/smaps; None where there is no such file."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return None
    address, inside, sizes = array.ctypes.data, False, {"Rss": 0, "AnonHugePages": 0}
    for line in smaps.read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            inside = int(span[1], 16) < address + array.nbytes and int(span[2], 16) > address
        elif inside and line.partition(":")[0] in sizes:
            sizes[line.partition(":")[0]] += int(line.split()[1])
    return sizes["AnonHugePages"] / sizes["Rss"] if sizes["Rss"] else None
