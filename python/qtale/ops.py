"""The operators: numpy arrays or torch tensors in, the same kind out, computed by the C++ core.

Weights are ``[out_features, in_features]``. Codes are signed integers of ``num_bits`` bits in
``[-2^(num_bits - 1), 2^(num_bits - 1) - 1]``; a weight is ``(code - zero_point) * scale`` with one scale (and zero
point) per output row and group of ``in_features / groups`` inputs. Round to nearest, ties to even.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtale import _core
from qtale.errors import InputError
from qtale.tensors import contiguous, dtype_name, empty, is_torch, memory

if TYPE_CHECKING:
    from qtale.tensors import Array

__all__ = [
    "dequantize",
    "fake_quantize",
    "pack",
    "prepack",
    "prepacked_info",
    "qmatmul",
    "quantize",
    "unpack",
    "unprepack",
]


def _matrix_shape(op: str, name: str, array: Array) -> tuple[int, int]:
    if array.ndim != 2:
        raise InputError(f"{op}: {name} has shape {list(array.shape)}; expected a matrix.")
    return int(array.shape[0]), int(array.shape[1])


def _optional(array: Array | None) -> Any:
    return None if array is None else memory(array)


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
    out_features, in_features = _matrix_shape("quantize", "weight", weight)
    if group_size < 0 or (group_size and in_features % group_size):
        raise InputError(
            f"quantize: group_size {group_size} does not divide in_features {in_features}; use a divisor, or 0."
        )
    groups = max(1, in_features // group_size) if group_size else 1
    codes = empty(weight, (out_features, in_features), "int8")
    scale = empty(weight, (out_features, groups), scale_dtype or dtype_name(weight))
    zero_point = None if symmetric else empty(weight, (out_features, groups), "int8")
    _core.quantize(memory(weight), num_bits, memory(codes), memory(scale), _optional(zero_point))
    return codes, scale, zero_point


def dequantize(codes: Array, scale: Array, zero_point: Array | None = None, dtype: str | None = None) -> Any:
    """``(codes - zero_point) * scale`` [out, in] in ``dtype`` (default: that of the scale)."""
    shape = _matrix_shape("dequantize", "codes", codes)
    out = empty(codes, shape, dtype or dtype_name(scale))
    _core.dequantize(memory(codes), memory(scale), _optional(zero_point), memory(out))
    return out


def pack(codes: Array, num_bits: int) -> Any:
    """Codes [rows, cols] as compressed-tensors stores them: int32 [rows, ceil(cols * num_bits / 32)].

    Each row is a little-endian bit stream of ``code + 2^(num_bits - 1)``; elements may straddle words.
    """
    rows, cols = _matrix_shape("pack", "codes", codes)
    packed = empty(codes, (rows, (cols * num_bits + 31) // 32), "int32")
    _core.pack(memory(codes), num_bits, memory(packed))
    return packed


def unpack(packed: Array, num_bits: int, cols: int) -> Any:
    """The exact inverse of :func:`pack` for rows of ``cols`` codes."""
    rows, _ = _matrix_shape("unpack", "packed", packed)
    if cols < 0:
        raise InputError(f"unpack: cols {cols} is negative.")
    codes = empty(packed, (rows, cols), "int8")
    _core.unpack(memory(packed), num_bits, memory(codes))
    return codes


def prepack(codes: Array, scale: Array, zero_point: Array | None = None, *, num_bits: int) -> Any:
    """Codes and parameters in the layout that the kernels of this CPU read: a self-describing uint8 vector.

    Groups are multiples of 32 inputs, or one per row. The layout belongs to the instruction set in use: keep packed
    codes on disk, not this.
    """
    out_features, in_features = _matrix_shape("prepack", "codes", codes)
    groups = _matrix_shape("prepack", "scale", scale)[1]
    size = _core.prepacked_bytes(
        out_features, in_features, groups, num_bits, zero_point is None, dtype_name(scale)
    )
    buffer = empty(codes, (size,), "uint8")
    _core.prepack(memory(codes), memory(scale), _optional(zero_point), num_bits, memory(buffer))
    return buffer


def prepacked_info(prepacked: Array) -> dict[str, Any]:
    """What a prepacked buffer holds: out_features, in_features, groups, num_bits, symmetric, scale_dtype."""
    names = ("out_features", "in_features", "groups", "num_bits", "symmetric", "scale_dtype")
    return dict(zip(names, _core.prepacked_info(memory(prepacked)), strict=True))


def unprepack(prepacked: Array) -> tuple[Any, Any, Any]:
    """The exact inverse of :func:`prepack`: (codes, scale, zero_point or None)."""
    info = prepacked_info(prepacked)
    params = (info["out_features"], info["groups"])
    codes = empty(prepacked, (info["out_features"], info["in_features"]), "int8")
    scale = empty(prepacked, params, info["scale_dtype"])
    zero_point = None if info["symmetric"] else empty(prepacked, params, "int8")
    _core.unprepack(memory(prepacked), memory(codes), memory(scale), _optional(zero_point))
    return codes, scale, zero_point


def qmatmul(x: Array, prepacked: Array, out_features: int, bias: Array | None = None, compute: str = "int8") -> Any:
    """``x @ weight.T + bias`` with a prepacked weight; x [..., in_features], result [..., out_features] in x's dtype.

    ``compute="int8"`` rounds activations to 8 bits per row and 128 inputs:
    ``|error| <= sum_k |w_k| * amax(group of k) / 254`` plus float32 rounding.
    ``compute="float"`` takes them as they are and sums in float32.
    """
    if is_torch(x):
        import qtale.torch_ops

        return qtale.torch_ops.qmatmul(x, prepacked, out_features, bias, compute)
    return run_qmatmul(x, prepacked, out_features, bias, compute)


def run_qmatmul(x: Array, prepacked: Array, out_features: int, bias: Array | None, compute: str) -> Any:
    """:func:`qmatmul` without torch's dispatcher."""
    in_features = int(x.shape[-1]) if x.ndim else 0
    rows = contiguous(x.reshape(-1, in_features)) if in_features else x.reshape(x.shape[0] if x.ndim == 2 else -1, 0)
    y = empty(x, (int(rows.shape[0]), out_features), dtype_name(x))
    bias32 = None if bias is None else contiguous(bias.float() if is_torch(bias) else bias.astype("float32", copy=False))
    _core.qmatmul(memory(rows), memory(prepacked), _optional(bias32), memory(y), compute)
    return y.reshape(*x.shape[:-1], out_features)


def fake_quantize(x: Array, scale: Array, zero_point: Array | None = None, *, num_bits: int) -> Any:
    """``x`` [out, in] through quantization with given parameters and back, in x's dtype.

    With autograd, gradients pass straight through where the code is not clamped (Bengio et al. 2013).
    """
    if is_torch(x):
        import qtale.torch_ops

        return qtale.torch_ops.fake_quantize(x, scale, zero_point, num_bits)
    return run_fake_quantize(x, scale, zero_point, num_bits)


def run_fake_quantize(x: Array, scale: Array, zero_point: Array | None, num_bits: int) -> Any:
    """:func:`fake_quantize` without torch's dispatcher."""
    out = empty(x, _matrix_shape("fake_quantize", "x", x), dtype_name(x))
    _core.fake_quantize(memory(x), memory(scale), _optional(zero_point), num_bits, memory(out))
    return out
