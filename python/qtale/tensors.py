"""Memory of torch tensors and numpy arrays as the core sees it, and new memory of the same kind. No copies."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from qtale.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs

    Array = torch.Tensor | np.ndarray[Any, Any]
    Memory = tuple[int, str, tuple[int, ...], tuple[int, ...], int]

ALIGNMENT = 64
FLOATS = ("float32", "float16", "bfloat16")
# Filled at the first use of each dtype: str(dtype) costs more than a kernel on a small matrix.
_torch_names: dict[Any, str] = {}


def is_torch(array: object) -> TypeIs[torch.Tensor]:
    """True for a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def torch_dtype_name(dtype: torch.dtype) -> str:
    """'float16' for torch.float16."""
    name = _torch_names.get(dtype)
    if name is None:
        name = _torch_names[dtype] = str(dtype).removeprefix("torch.")
    return name


def dtype_name(array: Array) -> str:
    """'float16', 'int8' …: the names that torch and numpy share."""
    if is_torch(array):
        return torch_dtype_name(array.dtype)
    return str(np.asarray(array).dtype.name)


def memory(array: Array) -> Memory:
    """(pointer, dtype, shape, strides in elements, device index or -1) of a tensor or array.

    Raises InputError for anything else and UnsupportedError for tensors that the core cannot address.
    """
    if is_torch(array):
        return _torch_memory(array)
    if isinstance(array, np.ndarray):
        return array.ctypes.data, array.dtype.name, array.shape, _numpy_strides(array), -1
    raise not_an_array(array)


def not_an_array(value: object) -> InputError:
    """The error for arguments of other kinds."""
    return InputError(f"expected a torch tensor or a numpy array, got {type(value).__name__}.")


def _numpy_strides(array: np.ndarray[Any, Any]) -> tuple[int, ...]:
    if not array.size:
        return _row_major(array.shape)
    itemsize = array.dtype.itemsize
    if any(stride % itemsize for stride in array.strides):
        raise InputError("numpy array: its strides are no multiple of its item size; pass a contiguous copy.")
    return tuple(stride // itemsize for stride in array.strides)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    # Arrays without elements come with arbitrary strides, which the core would take for gaps.
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _torch_memory(tensor: Any) -> Memory:
    if not tensor.is_cpu or tensor.layout is not sys.modules["torch"].strided:
        raise UnsupportedError(
            f"a {tensor.layout} tensor on {tensor.device} is not supported; use a dense tensor on the CPU."
        )
    shape = tuple(tensor.shape)
    strides = tensor.stride() if tensor.numel() else _row_major(shape)
    return tensor.data_ptr(), torch_dtype_name(tensor.dtype), shape, strides, -1


def empty(like: Array, shape: tuple[int, ...], dtype: str) -> Any:
    """Uninitialized memory of the kind and device of ``like``, 64-byte aligned."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if dtype == "bfloat16":
        raise InputError("numpy has no bfloat16; pass torch tensors or ask for float16 or float32.")
    itemsize = np.dtype(dtype).itemsize
    count = int(np.prod(shape, dtype=np.int64)) * itemsize
    raw = np.empty(count + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count].view(dtype).reshape(shape)


def contiguous(array: Array) -> Any:
    """The array itself if it is contiguous, else a contiguous copy."""
    return array.contiguous() if is_torch(array) else np.ascontiguousarray(array)
