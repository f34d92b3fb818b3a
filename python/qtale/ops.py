"""The operators: numpy arrays or torch tensors in, the same kind out, computed by the C++ core.

Weights are ``[out_features, in_features]``. Codes are signed integers of ``num_bits`` bits in
``[-2^(num_bits - 1), 2^(num_bits - 1) - 1]``; a weight is ``(code - zero_point) * scale`` with one scale (and zero
point) per output row and group of ``in_features / groups`` inputs. Round to nearest, ties to even.

Torch tensors go through ``torch.ops.qtale`` (:mod:`qtale.torch_ops`, :mod:`qtale.torch_dense`), so they can be compiled
and differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from qtale import kernels
from qtale.errors import InputError
from qtale.tensors import FLOATS, dtype_name, is_torch, not_an_array

if TYPE_CHECKING:
    from qtale.tensors import Array

__all__ = [
    "compact_rows",
    "dequantize",
    "fake_quantize",
    "jaccard",
    "matmul",
    "pack",
    "prepack",
    "prepacked_info",
    "project_topk",
    "qmatmul",
    "quantize",
    "routed_rows",
    "scatter_add_rows",
    "unpack",
    "unprepack",
]

prepacked_info = kernels.prepacked_info
unprepack = kernels.unprepack


def _backend(array: Array) -> ModuleType:
    if is_torch(array):
        import qtale.torch_ops

        return qtale.torch_ops
    if not isinstance(array, np.ndarray):
        raise not_an_array(array)
    return kernels


def _dense_backend(array: Array) -> ModuleType:
    if is_torch(array):
        import qtale.torch_dense

        return qtale.torch_dense
    return _backend(array)


def _check_float(op: str, name: str, dtype: str | None) -> None:
    if dtype is not None and dtype not in FLOATS:
        raise InputError(f"{op}: {name} {dtype!r} is not supported; use {', '.join(FLOATS)} (by name).")


def quantize(
    weight: Array,
    num_bits: int,
    group_size: int = 0,
    symmetric: bool = True,
    scale_dtype: str | None = None,
) -> tuple[Any, Any, Any]:
    """Round-to-nearest codes of ``weight`` [out, in] in float32, float16 or bfloat16.

    ``group_size`` 0 means one scale per output row. Symmetric scales are ``amax / ((2^num_bits - 1) / 2)``, asymmetric
    ones ``(max - min) / (2^num_bits - 1)`` over a range that includes zero, as compressed-tensors has them; they are
    rounded to ``scale_dtype`` (default: that of the weight) before codes are made.

    Returns (codes int8 [out, in], scale [out, groups], zero_point int8 [out, groups] or None).
    Raises InputError for NaN or infinite weights, wrong bits and groups that do not divide in_features.
    """
    _check_float("quantize", "scale_dtype", scale_dtype)
    return _backend(weight).quantize(weight, num_bits, group_size, symmetric, scale_dtype)  # type: ignore[no-any-return]


def dequantize(codes: Array, scale: Array, zero_point: Array | None = None, dtype: str | None = None) -> Any:
    """``(codes - zero_point) * scale`` [out, in] in ``dtype`` (default: that of the scale)."""
    _check_float("dequantize", "dtype", dtype)
    return _backend(codes).dequantize(codes, scale, zero_point, dtype)


def pack(codes: Array, num_bits: int) -> Any:
    """Codes [rows, cols] as compressed-tensors stores them: int32 [rows, ceil(cols * num_bits / 32)].

    Each row is a little-endian bit stream of ``code + 2^(num_bits - 1)``; elements may straddle words.
    """
    return _backend(codes).pack(codes, num_bits)


def unpack(packed: Array, num_bits: int, cols: int) -> Any:
    """The exact inverse of :func:`pack` for rows of ``cols`` codes."""
    return _backend(packed).unpack(packed, num_bits, cols)


def prepack(codes: Array, scale: Array, zero_point: Array | None = None, *, num_bits: int) -> Any:
    """Codes and parameters in the layout that the kernels of this CPU read: a self-describing uint8 vector.

    Groups are multiples of 32 inputs, or one per row. The layout belongs to the instruction set in use: keep packed
    codes on disk, not this. :func:`unprepack` is its exact inverse on every CPU.
    """
    return _backend(codes).prepack(codes, scale, zero_point, num_bits=num_bits)


def qmatmul(x: Array, prepacked: Array, out_features: int, bias: Array | None = None, compute: str = "int8") -> Any:
    """``x @ weight.T + bias`` with a prepacked weight; x [..., in_features], result [..., out_features] in x's dtype.

    ``compute="int8"`` rounds activations to 8 bits per row and 128 inputs:
    ``|error| <= sum_k |w_k| * amax(group of k) / 254`` plus float32 rounding.
    ``compute="int16"`` likewise to 16 bits, which divides that error by 254 (down to amax of 2^-103).
    ``compute="float"`` takes them as they are and sums products of unsigned codes in float32: ``|error| <= (in + 56) *
    2^-24 * sum_k (|code_k| + |zero_point| + 2^num_bits) * scale * max(|x_k|, 2^-96)``. (Where it is faster, activations
    are split into bf16 or integer numbers that keep 17 bits or more; AVX2 then gives NaN for a row that holds inf.)
    Rounding to the dtype of x comes on top.
    With autograd, gradients reach x (through the dequantized weight, in float32) and bias.
    """
    return _backend(x).qmatmul(x, prepacked, out_features, bias, compute)


def fake_quantize(x: Array, scale: Array, zero_point: Array | None = None, *, num_bits: int) -> Any:
    """``x`` [out, in] through quantization with given parameters and back, in x's dtype.

    With autograd, gradients pass straight through where the code is not clamped (Bengio et al. 2013).
    """
    return _backend(x).fake_quantize(x, scale, zero_point, num_bits=num_bits)


def project_topk(x: Array, matrix: Array, k: int) -> tuple[Any, Any]:
    """The ``k`` largest values of every row of ``x @ matrix.T`` and the rows of the matrix that they belong to.

    x is [n, depth] in float32; matrix [vocab, depth] in float32, float16 or bfloat16, its rows contiguous. Products are
    never stored: beside its results a call takes a float32 copy of up to 512 rows of x, and O(512 k) per thread. Sums
    are float32, ``|error| <= (depth + 8) * 2^-24 * sum_i |x_i * matrix_i|``; threads do not change them.

    Returns (values float32 [n, k] in descending order, indices int32 [n, k]); of equal values the smaller index comes
    first. There is no gradient. Raises InputError for a k outside 1 … vocab, and names the row whose product is NaN.
    """
    return _backend(x).project_topk(x, matrix, k)  # type: ignore[no-any-return]


def jaccard(a: Array, b: Array) -> Any:
    """``|A ∩ B| / |A ∪ B|`` in float64 [n] of the index sets in the rows of ``a`` [n, ka] and ``b`` [n, kb], int32.

    What stands twice in a row counts once; two empty sets give 1. There is no gradient.
    """
    return _backend(a).jaccard(a, b)


def matmul(x: Array, weight: Array, bias: Array | None = None, compute: str = "float") -> Any:
    """``x @ weight.T + bias`` in float32 with a weight that is not quantized; x [..., in], result [..., out].

    x is float32; weight [out, in] float32, float16 or bfloat16, its rows contiguous; bias [out]. Sums are float32,
    ``|error| <= (in + 8) * 2^-24 * (sum_i |x_i * weight_i| + |bias|)``. A row of the result depends on its row of x
    alone, bit for bit, whatever rows it comes with. With autograd, gradients reach x, weight and bias.
    ``compute="bfloat16"`` rounds x and weight to bfloat16 before they are multiplied, twice as fast; it takes a CPU
    with AVX-512 BF16 and an even number of inputs, and gradients are those of the numbers as they were.
    Raises InputError for other dtypes, modes that the CPU lacks and shapes that do not fit.
    """
    return _dense_backend(x).matmul(x, weight, bias, compute)


def compact_rows(x: Array, indices: Array) -> Any:
    """``x[indices]`` in float32 [count, n]: the rows of x that execute a routed block, side by side.

    x is [rows, n] in float32, float16 or bfloat16, its rows contiguous; indices int32 [count] in any order. With
    autograd, gradients reach x. Raises InputError for an index outside of x.
    """
    return _dense_backend(x).compact_rows(x, indices)


def scatter_add_rows(x: Array, delta: Array, indices: Array, gates: Array | None = None) -> Any:
    """A copy of x with ``gates[i] * delta[i]`` added to its row ``indices[i]``: what a routed block gives back.

    x [rows, n] and delta [count, n] are float32 with contiguous rows; indices int32 [count], none twice; gates float32
    [count], all 1 by default. With autograd, gradients reach x, delta and gates.
    Raises InputError for an index outside of x or one that stands twice.
    """
    return _dense_backend(x).scatter_add_rows(x, delta, indices, gates)


def routed_rows(x: Array, executed: Array, block: Callable[[Any], Any]) -> Any:
    """A copy of x to which ``block``'s update is added in the rows that are executed: a layer that tokens can skip.

    x is [rows, n] in float32, its rows contiguous; executed bool [rows]. ``block`` takes a copy of the executed rows,
    [count, n], side by side, and returns what is added to them, of the same shape and dtype; it is not called where
    count is 0. All other rows of the result are those of x, bit for bit. With autograd, gradients reach x and whatever
    ``block`` multiplies with. Raises InputError for arrays of other shapes, dtypes or kinds.
    """
    _check_rows("x", x, x, "float32", ["rows", "n"])
    _check_rows("executed", executed, x, "bool", [len(x)])
    places = executed.nonzero().squeeze(1).int() if is_torch(executed) else np.flatnonzero(executed).astype(np.int32)
    rows = compact_rows(x, places)
    if len(places):
        rows = block(rows)
        _check_rows("what block returned", rows, x, "float32", [len(places), x.shape[1]])
    return scatter_add_rows(x, rows, places)


def _check_rows(name: str, array: Array, like: Array, dtype: str, shape: list[Any]) -> None:
    """InputError unless the array is of the kind of ``like``, of that dtype and shape; names stand for any size."""
    if not is_torch(array) and not isinstance(array, np.ndarray):
        raise not_an_array(array)
    fits = len(array.shape) == len(shape) and all(
        isinstance(want, str) or size == want for size, want in zip(array.shape, shape, strict=True)
    )
    if not fits or dtype_name(array) != dtype or is_torch(array) != is_torch(like):
        expected = f"{dtype} [{', '.join(map(str, shape))}] in {'torch' if is_torch(like) else 'numpy'}"
        kind = "torch" if is_torch(array) else "numpy"
        raise InputError(
            f"routed_rows: {name} is {dtype_name(array)} {list(array.shape)} in {kind}; expected {expected}."
        )
