"""The core's kernels on numpy arrays and torch CPU tensors alike, without torch's dispatcher; see :mod:`qtale.ops`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from qtale import _core
from qtale.errors import InputError
from qtale.spec import DENSE_COMPUTE
from qtale.tensors import contiguous, dtype_name, empty, is_torch, memory

if TYPE_CHECKING:
    from qtale.tensors import Array

PREPACKED_FIELDS = ("out_features", "in_features", "groups", "num_bits", "symmetric", "scale_dtype")


def _matrix_shape(op: str, name: str, array: Array) -> tuple[int, int]:
    if array.ndim != 2:
        raise InputError(f"{op}: {name} has shape {list(array.shape)}; expected a matrix.")
    return int(array.shape[0]), int(array.shape[1])


def _optional(array: Array | None) -> Any:
    return None if array is None else memory(array)


def group_count(in_features: int, group_size: int, op: str = "quantize") -> int:
    """Scales per output row; raises InputError where ``group_size`` does not divide in_features."""
    if group_size < 0 or (group_size and in_features % group_size):
        raise InputError(
            f"{op}: group_size {group_size} does not divide in_features {in_features}; use a divisor, or 0."
        )
    return max(1, in_features // group_size) if group_size else 1


def quantize(
    weight: Array, num_bits: int, group_size: int, symmetric: bool, scale_dtype: str | None
) -> tuple[Any, Any, Any]:
    """:func:`qtale.ops.quantize`."""
    out_features, in_features = _matrix_shape("quantize", "weight", weight)
    groups = group_count(in_features, group_size)
    codes = empty(weight, (out_features, in_features), "int8")
    scale = empty(weight, (out_features, groups), scale_dtype or dtype_name(weight))
    zero_point = None if symmetric else empty(weight, (out_features, groups), "int8")
    _core.quantize(memory(weight), num_bits, memory(codes), memory(scale), _optional(zero_point))
    return codes, scale, zero_point


def dequantize(codes: Array, scale: Array, zero_point: Array | None, dtype: str | None) -> Any:
    """:func:`qtale.ops.dequantize`."""
    out = empty(codes, _matrix_shape("dequantize", "codes", codes), dtype or dtype_name(scale))
    _core.dequantize(memory(codes), memory(scale), _optional(zero_point), memory(out))
    return out


def pack(codes: Array, num_bits: int) -> Any:
    """:func:`qtale.ops.pack`."""
    rows, cols = _matrix_shape("pack", "codes", codes)
    packed = empty(codes, (rows, (cols * num_bits + 31) // 32), "int32")
    _core.pack(memory(codes), num_bits, memory(packed))
    return packed


def unpack(packed: Array, num_bits: int, cols: int) -> Any:
    """:func:`qtale.ops.unpack`."""
    rows, _ = _matrix_shape("unpack", "packed", packed)
    if cols < 0:
        raise InputError(f"unpack: cols {cols} is negative.")
    codes = empty(packed, (rows, cols), "int8")
    _core.unpack(memory(packed), num_bits, memory(codes))
    return codes


def prepack(codes: Array, scale: Array, zero_point: Array | None, *, num_bits: int) -> Any:
    """:func:`qtale.ops.prepack`."""
    out_features, in_features = _matrix_shape("prepack", "codes", codes)
    groups = _matrix_shape("prepack", "scale", scale)[1]
    symmetric = zero_point is None
    size = _core.prepacked_bytes(out_features, in_features, groups, num_bits, symmetric, dtype_name(scale))
    buffer = empty(codes, (size,), "uint8")
    _core.prepack(memory(codes), memory(scale), _optional(zero_point), num_bits, memory(buffer))
    return buffer


def prepacked_info(prepacked: Array) -> dict[str, Any]:
    """What a prepacked buffer holds: out_features, in_features, groups, num_bits, symmetric, scale_dtype."""
    return dict(zip(PREPACKED_FIELDS, _core.prepacked_info(memory(prepacked)), strict=True))


def unprepack(prepacked: Array) -> tuple[Any, Any, Any]:
    """The exact inverse of :func:`qtale.ops.prepack`: (codes, scale, zero_point or None)."""
    info = prepacked_info(prepacked)
    params = (info["out_features"], info["groups"])
    codes = empty(prepacked, (info["out_features"], info["in_features"]), "int8")
    scale = empty(prepacked, params, info["scale_dtype"])
    zero_point = None if info["symmetric"] else empty(prepacked, params, "int8")
    _core.unprepack(memory(prepacked), memory(codes), memory(scale), _optional(zero_point))
    return codes, scale, zero_point


def qmatmul(x: Array, prepacked: Array, out_features: int, bias: Array | None, compute: str) -> Any:
    """:func:`qtale.ops.qmatmul`."""
    if x.ndim == 0:
        raise InputError("qmatmul: x is a scalar; expected [..., in_features].")
    shape = x.shape
    flat = x.ndim == 2
    rows = contiguous(x if flat else x.reshape(math.prod(shape[:-1]), shape[-1]))
    y = empty(x, (rows.shape[0], out_features), dtype_name(x))
    # Named, so that it lives until the core has read it.
    bias32 = _float32(bias)
    _core.qmatmul(memory(rows), memory(prepacked), _optional(bias32), memory(y), compute)
    return y if flat else y.reshape((*shape[:-1], out_features))


def fake_quantize(x: Array, scale: Array, zero_point: Array | None, *, num_bits: int) -> Any:
    """:func:`qtale.ops.fake_quantize`."""
    out = empty(x, _matrix_shape("fake_quantize", "x", x), dtype_name(x))
    _core.fake_quantize(memory(x), memory(scale), _optional(zero_point), num_bits, memory(out))
    return out


def project_topk(x: Array, matrix: Array, k: int) -> tuple[Any, Any]:
    """:func:`qtale.ops.project_topk`."""
    rows, _ = _matrix_shape("project_topk", "x", x)
    entries, _ = _matrix_shape("project_topk", "matrix", matrix)
    if not 1 <= k <= entries:
        raise InputError(f"project_topk: k is {k}, but the matrix has {entries} rows; use a k from 1 to that.")
    values, indices = empty(x, (rows, k), "float32"), empty(x, (rows, k), "int32")
    _core.project_topk(memory(x), memory(matrix), memory(values), memory(indices))
    return values, indices


def jaccard(a: Array, b: Array) -> Any:
    """:func:`qtale.ops.jaccard`."""
    rows, _ = _matrix_shape("jaccard", "a", a)
    _matrix_shape("jaccard", "b", b)
    out = empty(a, (rows,), "float64")
    _core.jaccard(memory(a), memory(b), memory(out))
    return out


def matmul(x: Array, weight: Array, bias: Array | None, compute: str = "float") -> Any:
    """:func:`qtale.ops.matmul`."""
    if compute not in DENSE_COMPUTE:
        raise InputError(f"matmul: compute {compute!r} is not a mode; use {' or '.join(map(repr, DENSE_COMPUTE))}.")
    if x.ndim == 0:
        raise InputError("matmul: x is a scalar; expected [..., in].")
    shape = x.shape
    flat = x.ndim == 2
    rows = x if flat else contiguous(x.reshape(math.prod(shape[:-1]), shape[-1]))
    out_features, _ = _matrix_shape("matmul", "weight", weight)
    y = empty(x, (rows.shape[0], out_features), "float32")
    bias32 = _float32(bias)
    _core.matmul(memory(rows), memory(weight), _optional(bias32), memory(y), compute)
    return y if flat else y.reshape((*shape[:-1], out_features))


def compact_rows(x: Array, indices: Array) -> Any:
    """:func:`qtale.ops.compact_rows`."""
    _, size = _matrix_shape("compact_rows", "x", x)
    if indices.ndim != 1:
        raise InputError(f"compact_rows: indices has shape {list(indices.shape)}; expected a vector.")
    out = empty(x, (indices.shape[0], size), "float32")
    _core.compact_rows(memory(x), memory(indices), memory(out))
    return out


def scatter_add_rows(x: Array, delta: Array, indices: Array, gates: Array | None) -> Any:
    """:func:`qtale.ops.scatter_add_rows`."""
    out = empty(x, _matrix_shape("scatter_add_rows", "x", x), dtype_name(x))
    out[:] = x
    _core.scatter_add_rows(memory(delta), memory(indices), _optional(gates), memory(out))
    return out


def _float32(bias: Array | None) -> Any:
    if bias is None:
        return None
    return contiguous(bias.float() if is_torch(bias) else bias.astype("float32", copy=False))
