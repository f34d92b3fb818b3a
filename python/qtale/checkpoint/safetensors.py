"""Headers of safetensors files, checked as untrusted input, and reads of single tensors.

The format: 8 bytes of little-endian header length, a JSON object ``name → {dtype, shape, data_offsets}``, then data
without holes (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qtale.errors import CheckpointError, InputError

MAX_HEADER_BYTES = 100_000_000
MAX_COUNT = 2**63 - 1
MAX_NAME = 1000
ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
# What weights and scales are stored in, as safetensors and as torch and the core spell it.
STORED_FLOATS: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: ``dtype`` as safetensors spells it, ``start`` and ``end`` count from the file's begin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.nbytes // ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """A safetensors file whose header was checked."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Shard:
    """Read and check the header of a safetensors file; raises CheckpointError naming the file and the tensor."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: is not a regular file.")
            length = int.from_bytes(file.read(8), "little")
            if status.st_size < 8 or length > status.st_size - 8:
                raise CheckpointError(
                    f"{path}: is truncated or no safetensors file: it has {status.st_size} bytes and its header "
                    f"claims {length}; download it again."
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: the header claims {length} bytes; safetensors allows {MAX_HEADER_BYTES}."
                )
            header = _parse_json(path, file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    metadata = _check_metadata(path, header.pop("__metadata__", {}))
    data_start = 8 + length
    infos = [_check_entry(path, name, entry, data_start) for name, entry in header.items()]
    _check_coverage(path, infos, data_start, status.st_size)
    return Shard(path, {info.name: info for info in infos}, metadata)


def read_raw(path: Path, info: TensorInfo) -> npt.NDArray[np.uint8]:
    """The bytes of one tensor as uint8 [nbytes]; raises CheckpointError where the file changed or cannot be read."""
    raw = np.empty(info.nbytes, dtype=np.uint8)
    read_into(path, info, raw)
    return raw


def read_rows(path: Path, info: TensorInfo, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """The bytes of some rows of a matrix as uint8 [len(rows), row bytes], nothing else being read.

    Raises InputError for rows that the matrix does not have, else as :func:`read_raw` does.
    """
    count = info.shape[0]
    if len(rows) and not 0 <= rows.min() <= rows.max() < count:
        raise InputError(f"{path}: {info.name!r} has {count} rows; {rows.min()} to {rows.max()} were asked for.")
    row_bytes = info.nbytes // max(count, 1)
    raw = np.empty((len(rows), row_bytes), dtype=np.uint8)
    with _reading(path, info) as file:
        for row, target in zip(rows.tolist(), raw, strict=True):
            _fill(path, info, file, info.start + row * row_bytes, target)
    return raw


def read_into(path: Path, info: TensorInfo, target: npt.NDArray[np.uint8], skip: int = 0) -> None:
    """Read bytes of one tensor, from the ``skip``th on, into ``target``, uint8 [at most nbytes - skip] and contiguous.

    Raises as :func:`read_raw` does.
    """
    with _reading(path, info) as file:
        _fill(path, info, file, info.start + skip, target)


@contextmanager
def _reading(path: Path, info: TensorInfo) -> Iterator[FileIO]:
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path}: {info.name!r} cannot be read: {error.strerror or error}.") from error


def _fill(path: Path, info: TensorInfo, file: FileIO, start: int, target: npt.NDArray[np.uint8]) -> None:
    view = target.data
    file.seek(start)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{path}: ended while {info.name!r} was read; the file changed.")
        done += count


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in result if names.count(name) > 1)
            raise CheckpointError(f"{path}: the header names {twice!r} twice.")
        return result

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}); download the file again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header must be a JSON object, not {type(header).__name__}.")
    return header


def _check_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: '__metadata__' in the header must map names to strings.")
    return metadata


def _check_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise CheckpointError(f"{path}: tensor {name[:80]!r} has a name that is empty, too long or not printable.")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: its header entry must hold exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where} has dtype {dtype!r}; known are {', '.join(sorted(ITEM_BYTES))}.")
    if not _are_counts(shape):
        raise CheckpointError(f"{where} has shape {shape!r}; it must be a list of integers from 0 to 2^63 - 1.")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {offsets!r}; they must be [begin, end] with begin <= end.")
    nbytes = ITEM_BYTES[dtype]
    for size in shape:
        nbytes *= size
        # A later 0 must not hide an overflow: other readers multiply in 64 bits.
        if nbytes > MAX_COUNT:
            raise CheckpointError(f"{where} has shape {shape!r}, whose size overflows 64 bits.")
    if nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {dtype} of shape {shape} needs {nbytes} bytes, but its data_offsets span "
            f"{offsets[1] - offsets[0]}."
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= MAX_COUNT for value in values)


def _check_coverage(path: Path, infos: list[TensorInfo], data_start: int, file_size: int) -> None:
    position = data_start
    for info in sorted(infos, key=lambda info: (info.start, info.end)):
        if info.start != position:
            problem = "overlaps another tensor" if info.start < position else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {info.name!r} at byte {info.start} {problem}; the data before it ends at {position}."
            )
        position = info.end
    if position != file_size:
        problem = "is truncated" if position > file_size else "has bytes after its last tensor"
        raise CheckpointError(f"{path}: {problem}: the header describes {position} bytes, the file has {file_size}.")
