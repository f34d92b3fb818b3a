"""An independent reader of compressed-tensors' `pack-quantized` files in plain Python and NumPy: bits, not speed.

It shares no code with qtale nor with compressed-tensors, so that a wrong idea of the layout cannot agree with itself.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# bfloat16 has no NumPy type; its bits travel as uint16.
STORED = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True)
class Tensor:
    """A stored tensor: its safetensors dtype name, and its values (the raw bits for BF16)."""

    dtype: str
    values: Array

    def float32(self) -> Array:
        """The values as float32, exactly."""
        if self.dtype == "BF16":
            return (self.values.astype(np.uint32) << 16).view(np.float32)
        return self.values.astype(np.float32)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file."""
    raw = path.read_bytes()
    (header_size,) = struct.unpack("<Q", raw[:8])
    data = raw[8 + header_size :]
    tensors = {}
    for name, entry in json.loads(raw[8 : 8 + header_size]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            values = np.frombuffer(data[begin:end], dtype=STORED[entry["dtype"]]).reshape(entry["shape"])
            tensors[name] = Tensor(entry["dtype"], values)
    return tensors


def unpack(words: Array, num_bits: int, count: int) -> Array:
    """Codes [rows, count] of int32 words [rows, n]: element i is the bits from i * num_bits on, less 2^(bits-1)."""
    stored = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    bits = np.unpackbits(stored, axis=1, count=count * num_bits, bitorder="little").reshape(-1, count, num_bits)
    return np.packbits(bits, axis=2, bitorder="little")[:, :, 0].astype(np.int64) - (1 << (num_bits - 1))


def scheme_of(module: str, config: dict[str, Any]) -> dict[str, Any]:
    """The `weights` arguments of a Linear module: exact name first, then `re:` pattern, then class name."""
    weights: dict[str, dict[str, Any]] = {
        target: group["weights"] for group in config["config_groups"].values() for target in group["targets"]
    }
    patterns = [key for key in weights if key.startswith("re:") and re.match(key[3:], module)]
    return next(weights[key] for key in (module, *patterns, "Linear") if key in weights)


@dataclass(frozen=True)
class Packed:
    """One quantized matrix: signed codes [out, in], scale [out, groups], zero point [out, groups] or None."""

    num_bits: int
    codes: Array
    scale: Tensor
    zero_point: Array | None

    def dequantized(self) -> Array:
        """(code - zero point) * scale [out, in] in float32, rounded once to the scale's type."""
        return round_to(self.exact(), self.scale.dtype)

    def exact(self) -> Array:
        """The same in float32, as the kernels compute with it."""
        groups = self.scale.values.shape[1]
        offset = self.zero_point if self.zero_point is not None else np.zeros((1, groups), dtype=np.int64)
        size = self.codes.shape[1] // groups
        centred = self.codes - np.repeat(offset, size, axis=1)
        product: Array = centred.astype(np.float32) * np.repeat(self.scale.float32(), size, axis=1)
        return product


def round_to(values: Array, dtype: str) -> Array:
    """float32 values rounded to nearest even in ``dtype``, kept as float32."""
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
    return values


def stored_bytes(values: Array, dtype: str) -> bytes:
    """float32 values that ``dtype`` can hold, as the little-endian bytes of ``dtype``; -0 becomes 0."""
    values = values + np.float32(0)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype(STORED[dtype]).tobytes()


def read_packed(folder: Path) -> dict[str, Packed]:
    """Module name to quantized matrix, of a folder with one model.safetensors."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = read_safetensors(folder / "model.safetensors")
    modules = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    result = {}
    for module in modules:
        scheme = scheme_of(module, config)
        rows, columns = map(int, tensors[f"{module}.weight_shape"].values)
        codes = unpack(tensors[f"{module}.weight_packed"].values, scheme["num_bits"], columns)
        scale = tensors[f"{module}.weight_scale"]
        zero_point = None
        if not scheme["symmetric"]:
            words = tensors[f"{module}.weight_zero_point"].values
            zero_point = unpack(words.T, scheme["num_bits"], rows).T
        result[module] = Packed(scheme["num_bits"], codes, scale, zero_point)
    return result
