"""Reads a model folder into one arena, one tensor at a time, in the layout that the kernels of this CPU read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qtale import _core
from qtale.checkpoint.folder import ModelFolder
from qtale.checkpoint.safetensors import read_into
from qtale.engine.arena import Arena, memory_of
from qtale.engine.regions import Block, Layout, Source, dense_shape
from qtale.errors import CheckpointError, Error, InputError
from qtale.format.tensors import PACKED, SCALE, ZERO_POINT
from qtale.memory import host
from qtale.memory.sizes import human_bytes

if TYPE_CHECKING:
    from qtale.tensors import Memory

# Numbers of 16 bits that numpy cannot compute with are moved as what they weigh.
_CARRIERS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def check_memory(layout: Layout, where: str, available: Callable[[], int | None] = host.available) -> None:
    """Raise Error where the free memory cannot hold the weights and what reading them takes."""
    free, needed = available(), layout.nbytes + layout.workspace
    if free is not None and needed > free:
        raise Error(
            f"{where}: its weights take {human_bytes(layout.nbytes)}, and {human_bytes(layout.workspace)} more while "
            f"they are read, but only {human_bytes(free)} of memory are free; quantize it to fewer bits (qtale "
            "quantize, or bits=4 at load), or free some memory."
        )


def read_weights(folder: ModelFolder, layout: Layout, arena: Arena, progress: bool = True) -> None:
    """Fill the arena from disk, quantizing where the layout says so.

    Beside the arena this holds one block at a time: its codes, and one tensor as stored or some rows of it. Raises
    CheckpointError where files changed, cannot be read, or hold NaN or infinities that would have to be quantized.
    """
    from tqdm.auto import tqdm

    with tqdm(
        total=layout.nbytes, desc="loading", unit="B", unit_scale=True, leave=False, delay=1, disable=not progress
    ) as bar:
        for block in layout.blocks.values():
            fill_block(folder, block, arena.view(block.offset, block.nbytes))
            bar.update(block.nbytes)


def fill_block(folder: ModelFolder, block: Block, target: npt.NDArray[np.uint8]) -> None:
    """Read one block of the layout into its slice of the arena."""
    if block.vectors:
        _fill_vectors(folder, block, target.view(np.float32))
    elif block.sources[0].spec is None:
        at = 0
        for source in block.sources:
            part = target[at : at + source.dense_nbytes]
            (_read_dense if source.is_stored else _read_converted)(folder, source, part)
            at += source.dense_nbytes
    else:
        _fill_packed(folder, block, target)


def _fill_vectors(folder: ModelFolder, block: Block, target: npt.NDArray[np.float32]) -> None:
    at = 0
    for name, size in block.vectors:
        target[at : at + size] = 0 if name is None else folder.numpy(name)
        at += size


def _read_dense(folder: ModelFolder, source: Source, target: npt.NDArray[np.uint8], skip: int = 0) -> None:
    shard = folder.shard_of(f"{source.module}.weight")
    read_into(shard.path, shard.tensors[f"{source.module}.weight"], target, skip)


def _read_converted(folder: ModelFolder, source: Source, target: npt.NDArray[np.uint8]) -> None:
    # In the bfloat16 and the form that memory holds, some rows at a time.
    width, at_once = source.nbytes // source.rows, source.converted_rows
    stored = np.empty(at_once * width, dtype=np.uint8)
    kept = target.reshape(source.rows, 2 * source.cols)
    for row in range(0, source.rows, at_once):
        count = min(at_once, source.rows - row)
        _read_dense(folder, source, stored[: count * width], row * width)
        _core.round_weights(
            memory_of(stored, source.stored, (count, source.cols)),
            memory_of(kept[row:], "bfloat16", dense_shape(count, source.cols, source.tiled)),
        )


def _fill_packed(folder: ModelFolder, block: Block, target: npt.NDArray[np.uint8]) -> None:
    first = block.sources[0]
    spec = first.spec
    if spec is None:
        raise InputError(f"{block.name}: has no spec to pack by.")
    codes = np.empty((block.rows, block.cols), dtype=np.int8)
    scale = np.empty((block.rows, block.groups), dtype=_CARRIERS[first.dtype])
    zero_point = None if spec.symmetric else np.empty((block.rows, block.groups), dtype=np.int8)
    at = 0
    for source in block.sources:
        rows = slice(at, at + source.rows)
        zero = None if zero_point is None else zero_point[rows]
        fill = _unpack if source.packed else _quantize
        fill(folder, source, spec.num_bits, codes[rows], scale[rows], zero)
        at += source.rows
    _core.prepack(
        memory_of(codes, "int8"),
        memory_of(scale, first.dtype),
        _zero_memory(zero_point),
        spec.num_bits,
        memory_of(target, "uint8"),
    )


def _zero_memory(zero_point: npt.NDArray[np.int8] | None) -> Memory | None:
    return None if zero_point is None else memory_of(zero_point, "int8")


def _unpack(
    folder: ModelFolder,
    source: Source,
    bits: int,
    codes: npt.NDArray[np.int8],
    scale: npt.NDArray[Any],
    zero_point: npt.NDArray[np.int8] | None,
) -> None:
    # Named, so that it lives until the core has read it.
    words = folder.numpy(f"{source.module}.{PACKED}")
    _core.unpack(memory_of(words, "int32"), bits, memory_of(codes, "int8"))
    scale[...] = folder.raw(f"{source.module}.{SCALE}").view(scale.dtype).reshape(scale.shape)
    if zero_point is not None:
        packed = np.ascontiguousarray(folder.numpy(f"{source.module}.{ZERO_POINT}").T)
        unpacked = np.empty((zero_point.shape[1], zero_point.shape[0]), dtype=np.int8)
        _core.unpack(memory_of(packed, "int32"), bits, memory_of(unpacked, "int8"))
        zero_point[...] = unpacked.T


def _quantize(
    folder: ModelFolder,
    source: Source,
    bits: int,
    codes: npt.NDArray[np.int8],
    scale: npt.NDArray[Any],
    zero_point: npt.NDArray[np.int8] | None,
) -> None:
    weight = np.empty(source.nbytes, dtype=np.uint8)
    _read_dense(folder, source, weight)
    try:
        _core.quantize(
            memory_of(weight, source.dtype, (source.rows, source.cols)),
            bits,
            memory_of(codes, "int8"),
            memory_of(scale, source.dtype),
            _zero_memory(zero_point),
        )
    except InputError as error:
        raise CheckpointError(f"{folder.path}: {source.module}.weight cannot be quantized: {error}") from error
