"""The operators once more in float64 NumPy, from their definitions: what tests compare the kernels with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
ACTIVATION_GROUP = 128


def spread(params: Array, in_features: int) -> Array:
    """Parameters [out, groups] repeated to [out, in]."""
    return np.repeat(params.astype(np.float64), in_features // params.shape[1], axis=1)


def dequantize(codes: Array, scale: Array, zero_point: Array | None) -> Array:
    """(codes - zero_point) * scale in float64 [out, in]."""
    shifted = codes.astype(np.float64)
    if zero_point is not None:
        shifted = shifted - spread(zero_point, codes.shape[1])
    return shifted * spread(scale, codes.shape[1])


def scales(weight: Array, num_bits: int, groups: int, symmetric: bool) -> Array:
    """Scales [out, groups] in float64, before they are rounded to a dtype."""
    grouped = weight.astype(np.float64).reshape(weight.shape[0], groups, -1)
    levels = 2**num_bits - 1
    if symmetric:
        return np.abs(grouped).max(-1) / (levels / 2)
    return (np.maximum(grouped.max(-1), 0) - np.minimum(grouped.min(-1), 0)) / levels


def pack(codes: Array, num_bits: int) -> Array:
    """int32 [rows, ceil(cols * bits / 32)]: one little-endian integer per row."""
    words = -(-codes.shape[1] * num_bits // 32)
    rows = []
    for row in codes:
        stream = 0
        for i, code in enumerate(row):
            stream |= (int(code) + (1 << (num_bits - 1))) << (i * num_bits)
        rows.append(np.frombuffer(stream.to_bytes(words * 4, "little"), dtype="<i4"))
    return np.array(rows, dtype=np.int32).reshape(codes.shape[0], words)


def rounding_bound(x: Array, weight: Array, compute: str) -> Array:
    """What rounding activations to 8 or 16 bits may cost: sum_k |w_k| * amax(group) / 254 or 254^2, [rows, out]."""
    rows, in_features = x.shape
    padded = np.zeros((rows, -(-in_features // ACTIVATION_GROUP) * ACTIVATION_GROUP))
    padded[:, :in_features] = np.abs(x)
    amax = padded.reshape(rows, -1, ACTIVATION_GROUP).max(-1).repeat(ACTIVATION_GROUP, 1)[:, :in_features]
    return amax @ np.abs(weight).T / {"int8": 254, "int16": 254**2}[compute]


def float_bound(x: Array, codes: Array, scale: Array, zero_point: Array | None, num_bits: int) -> Array:
    """The float32 rounding of ``compute="float"``, as cpp/include/qtale/ops.h states it, [rows, out]."""
    in_features = codes.shape[1]
    size = np.abs(codes.astype(np.float64)) + 2**num_bits
    if zero_point is not None:
        size = size + np.abs(spread(zero_point, in_features))
    return np.maximum(np.abs(x), 2.0**-96) @ (size * spread(scale, in_features)).T * (in_features + 56) * 2.0**-24
