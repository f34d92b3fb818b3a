"""Pieces of memory that hold weights, on huge pages where the system gives them."""

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
PAGE = mmap.PAGESIZE
_HUGE_PAGE = 2 << 20
# Dropping a part of a huge page frees nothing until it is split, which MADV_FREE does.
_RELEASE = ("MADV_NOHUGEPAGE", "MADV_FREE", "MADV_DONTNEED")


class Arena:
    """``nbytes`` of zeroed memory that begins on a huge page; ``view`` gives slices of it.

    What is left after the last whole huge page lies on small ones, so that no more is taken than ``nbytes``. All goes
    back to the system when the last slice is gone. Raises Error where the system has no such memory.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        try:
            memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise Error(f"load: the system does not give {nbytes} bytes of memory ({error}).") from error
        self._memory = memory
        whole = np.frombuffer(memory, dtype=np.uint8)
        self._start = -whole.ctypes.data % _HUGE_PAGE
        self.bytes: npt.NDArray[np.uint8] = whole[self._start : self._start + nbytes]
        huge = nbytes // _HUGE_PAGE * _HUGE_PAGE
        self._advise("MADV_HUGEPAGE", 0, huge)
        self._advise("MADV_NOHUGEPAGE", huge, nbytes - huge)

    def view(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """The bytes from ``offset`` on."""
        return self.bytes[offset : offset + nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Give these bytes back to the system, both numbers multiples of ``PAGE``; they then read as zeros."""
        for advice in _RELEASE:
            self._advise(advice, offset, nbytes)

    def _advise(self, advice: str, offset: int, nbytes: int) -> None:
        if nbytes and hasattr(mmap, advice):
            # Kernels without huge pages run as well, a little slower.
            with contextlib.suppress(OSError):
                self._memory.madvise(getattr(mmap, advice), self._start + offset, nbytes)


def aligned(size: int, to: int = ALIGNMENT) -> int:
    """``size`` rounded up to a multiple, by default to where the next slice may begin."""
    return -(-size // to) * to


def memory_of(array: npt.NDArray[Any], dtype: str, shape: tuple[int, ...] | None = None) -> Memory:
    """What the core takes for contiguous memory whose elements are ``dtype``, which numpy may not know (bfloat16)."""
    shape = array.shape if shape is None else shape
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return array.ctypes.data, dtype, tuple(shape), tuple(strides), -1
