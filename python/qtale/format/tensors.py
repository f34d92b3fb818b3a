"""The tensors of a ``pack-quantized`` module: names, shapes, and the way between them and codes, scales, zero points.

``weight_packed`` int32 [out, ceil(in*bits/32)], ``weight_scale`` [out, groups], ``weight_shape`` int64 [2] holding
[out, in], and for asymmetric ones ``weight_zero_point`` int32 [ceil(out*bits/32), groups], packed along dim 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qtale.checkpoint.folder import ModelFolder
from qtale.checkpoint.safetensors import STORED_FLOATS, TensorInfo
from qtale.checkpoint.writer import TensorShape
from qtale.errors import CheckpointError, UnsupportedError
from qtale.format.config import PackedConfig, parse_config
from qtale.spec import ResolvedSpec

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    Array = npt.NDArray[Any] | torch.Tensor

PACKED, SCALE, SHAPE, ZERO_POINT = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
SCALE_DTYPES = tuple(STORED_FLOATS)


@dataclass(frozen=True)
class PackedModule:
    """One quantized module of a folder; ``dtype`` is that of its scales, ``nbytes`` counts all of its tensors."""

    name: str
    spec: ResolvedSpec
    out_features: int
    in_features: int
    dtype: str
    nbytes: int


def packed_layout(module: str, shape: tuple[int, int], spec: ResolvedSpec, dtype: str) -> dict[str, TensorShape]:
    """The tensors of a module of ``shape`` [out, in]: suffix → name, dtype and shape; ``dtype`` is the scales'."""
    out_features, in_features = shape
    groups = spec.groups(in_features)
    tensors = {
        PACKED: TensorShape(f"{module}.{PACKED}", "I32", (out_features, _words(in_features, spec.num_bits))),
        SCALE: TensorShape(f"{module}.{SCALE}", dtype, (out_features, groups)),
        SHAPE: TensorShape(f"{module}.{SHAPE}", "I64", (2,)),
    }
    if not spec.symmetric:
        packed_rows = _words(out_features, spec.num_bits)
        tensors[ZERO_POINT] = TensorShape(f"{module}.{ZERO_POINT}", "I32", (packed_rows, groups))
    return tensors


def packed_tensors(
    module: str, codes: Array, scale: Array, zero_point: Array | None, num_bits: int
) -> dict[str, Array]:
    """The tensors to store for codes [out, in] int8, scale [out, groups] and zero_point [out, groups] int8 or None."""
    from qtale import ops

    tensors: dict[str, Array] = {
        f"{module}.{PACKED}": ops.pack(codes, num_bits),
        f"{module}.{SCALE}": scale,
        f"{module}.{SHAPE}": np.array(codes.shape, dtype=np.int64),
    }
    if zero_point is not None:
        tensors[f"{module}.{ZERO_POINT}"] = _transposed(ops.pack(_transposed(zero_point), num_bits))
    return tensors


def packed_modules(folder: ModelFolder, config: PackedConfig | None = None) -> dict[str, PackedModule]:
    """Every quantized module of a folder, its tensors checked against its config group; empty for a dense folder.

    Reads headers and the 16 bytes of each ``weight_shape``. Raises CheckpointError where tensors and config disagree,
    UnsupportedError for schemes that qtale does not read.
    """
    config = config or parse_config(folder.config, str(folder.path))
    stored = [name.removesuffix(f".{PACKED}") for name in folder.tensors if name.endswith(f".{PACKED}")]
    if config is None:
        if stored:
            raise CheckpointError(f"{folder.path}: {stored[0]} is packed, but config.json has no quantization_config.")
        return {}
    for target in config.targets:
        if f"{target}.weight" in folder.tensors and config.spec_of(target):
            raise CheckpointError(f"{folder.path}: config.json says {target} is quantized, but it is stored dense.")
    return {name: _check_module(folder, name, config.spec_of(name)) for name in stored}


def read_module(folder: ModelFolder, module: PackedModule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes int8 [out, in], scale [out, groups] and zero_point int8 [out, groups] (None when symmetric), from disk.

    w ≈ (codes - zero_point) * scale.
    """
    from qtale import ops

    bits = module.spec.num_bits
    codes = ops.unpack(folder.torch(f"{module.name}.{PACKED}"), bits, module.in_features)
    scale = folder.torch(f"{module.name}.{SCALE}")
    if module.spec.symmetric:
        return codes, scale, None
    packed_zero = _transposed(folder.torch(f"{module.name}.{ZERO_POINT}"))
    return codes, scale, _transposed(ops.unpack(packed_zero, bits, module.out_features))


def _check_module(folder: ModelFolder, name: str, spec: ResolvedSpec | None) -> PackedModule:
    where = f"{folder.path}: {name}"
    if spec is None:
        raise CheckpointError(f"{where} is packed, but no config group of config.json covers it.")
    if f"{name}.weight_g_idx" in folder.tensors:
        raise UnsupportedError(f"{where} orders its columns by activation (weight_g_idx); export without actorder.")
    out_features, in_features = _logical_shape(folder, name, where)
    if spec.group_size and in_features % spec.group_size:
        raise CheckpointError(f"{where}: in_features {in_features} is no multiple of group_size {spec.group_size}.")
    dtype = _stored(folder, f"{name}.{SCALE}").dtype
    if dtype not in SCALE_DTYPES:
        raise UnsupportedError(f"{where} has scales of dtype {dtype}; qtale reads {', '.join(SCALE_DTYPES)}.")
    nbytes = 0
    for expected in packed_layout(name, (out_features, in_features), spec, dtype).values():
        found = _stored(folder, expected.name)
        if (found.dtype, found.shape) != (expected.dtype, expected.shape):
            raise CheckpointError(
                f"{folder.path}: {expected.name} is {found.dtype} {list(found.shape)} where {spec.num_bits} bits of "
                f"[{out_features}, {in_features}] need {expected.dtype} {list(expected.shape)}."
            )
        nbytes += found.nbytes
    return PackedModule(name, spec, out_features, in_features, dtype, nbytes)


def _logical_shape(folder: ModelFolder, name: str, where: str) -> tuple[int, int]:
    info = _stored(folder, f"{name}.{SHAPE}")
    if info.dtype != "I64" or info.shape != (2,):
        raise UnsupportedError(f"{where}: {SHAPE} is {info.dtype} {list(info.shape)}; qtale reads matrices (I64 [2]).")
    rows, cols = (int(size) for size in folder.numpy(info.name))
    if rows <= 0 or cols <= 0:
        raise CheckpointError(f"{where}: {SHAPE} holds [{rows}, {cols}]; both must be positive.")
    return rows, cols


def _stored(folder: ModelFolder, name: str) -> TensorInfo:
    if name not in folder.tensors:
        raise CheckpointError(f"{folder.path}: tensor {name!r} is missing.")
    return folder.tensors[name]


def _words(count: int, num_bits: int) -> int:
    return -(-count * num_bits // 32)


def _transposed(matrix: Any) -> Any:
    """The transpose in contiguous memory, for numpy and torch alike."""
    return np.ascontiguousarray(matrix.T) if isinstance(matrix, np.ndarray) else matrix.T.contiguous()
