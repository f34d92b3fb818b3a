"""One piece of memory that holds all weights, on huge pages where the system gives them."""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qtale.errors import Error

if TYPE_CHECKING:
    from qtale.tensors import Memory

ALIGNMENT = 64
_HUGE_PAGE = 2 << 20


class Arena:
    """``nbytes`` of zeroed memory that begins on a huge page; ``view`` gives slices of it.

    It is given back to the system when the last slice is gone. Raises Error where the system has no such memory.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        try:
            memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise Error(f"load: the system does not give {nbytes} bytes of memory ({error}).") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Kernels without huge pages run as well, a little slower.
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(memory, dtype=np.uint8)
        start = -whole.ctypes.data % _HUGE_PAGE
        self.bytes: npt.NDArray[np.uint8] = whole[start : start + nbytes]

    def view(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """The bytes from ``offset`` on."""
        return self.bytes[offset : offset + nbytes]


def aligned(size: int) -> int:
    """``size`` rounded up to where the next slice may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def memory_of(array: npt.NDArray[Any], dtype: str, shape: tuple[int, ...] | None = None) -> Memory:
    """What the core takes for contiguous memory whose elements are ``dtype``, which numpy may not know (bfloat16)."""
    shape = array.shape if shape is None else shape
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return array.ctypes.data, dtype, tuple(shape), tuple(strides), -1
