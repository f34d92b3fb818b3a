"""A quantized weight as the tensors of compressed-tensors' ``pack-quantized``, and back; see :mod:`qtale.format`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtale import ops
from qtale.checkpoint.safetensors import STORED_FLOATS
from qtale.errors import InputError
from qtale.format.tensors import PACKED, SCALE, SHAPE, ZERO_POINT, packed_layout, packed_tensors
from qtale.spec import ResolvedSpec

_FLOATS = {stored: getattr(torch, name) for stored, name in STORED_FLOATS.items()}
_DTYPES = {"I32": torch.int32, "I64": torch.int64, **_FLOATS}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def pack_weight(codes: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> dict[str, Tensor]:
    """Suffix → tensor for codes int8 [out, in], scale [out, groups], zero_point int8 [out, groups] or None."""
    stored = packed_tensors("", codes, scale, zero_point, num_bits)
    return {name.removeprefix("."): torch.as_tensor(tensor) for name, tensor in stored.items()}


def packed_shapes(shape: tuple[int, int], spec: ResolvedSpec, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """What :func:`pack_weight` gives for a weight of ``shape`` [out, in], as tensors on the meta device."""
    layout = packed_layout("", shape, spec, _NAMES[scale_dtype])
    return {
        suffix: torch.empty(tensor.shape, dtype=_DTYPES[tensor.dtype], device="meta")
        for suffix, tensor in layout.items()
    }


def unpack_weight(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], spec: ResolvedSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero_point of stored tensors; raises InputError where they do not fit ``shape``, ``spec``."""
    scale = tensors[SCALE]
    if scale.dtype not in _FLOATS.values():
        raise InputError(f"{SCALE} is {scale.dtype}; expected float32, float16 or bfloat16.")
    for suffix, expected in packed_shapes(shape, spec, scale.dtype).items():
        found = tensors[suffix]
        if found.is_meta:
            raise InputError(f"{suffix} is on the meta device, without data.")
        if (found.dtype, found.shape) != (expected.dtype, expected.shape):
            raise InputError(
                f"{suffix} is {found.dtype} {list(found.shape)}, but {spec.num_bits} bits of {list(shape)} in groups "
                f"of {spec.group_size or shape[1]} need {expected.dtype} {list(expected.shape)}."
            )
    if tuple(tensors[SHAPE].tolist()) != shape:
        raise InputError(f"{SHAPE} holds {tensors[SHAPE].tolist()}; this layer is {list(shape)}.")
    codes = ops.unpack(tensors[PACKED].contiguous(), spec.num_bits, shape[1])
    if spec.symmetric:
        return codes, scale.contiguous(), None
    packed_zero = tensors[ZERO_POINT].t().contiguous()
    return codes, scale.contiguous(), ops.unpack(packed_zero, spec.num_bits, shape[0]).t().contiguous()
