"""What the kernels' benchmarks share: memory in huge pages."""

from __future__ import annotations

import mmap
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
