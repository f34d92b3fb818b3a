"""Reads the header of a GGUF file with every size, count and offset checked before it is used.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qtale.errors import CheckpointError, InputError, UnsupportedError

_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
# The least bytes that one entry takes: an empty name and a one-byte value; an empty name and no dimensions.
_MIN_PAIR, _MIN_TENSOR, _MIN_STRING = 13, 24, 8
Value = int | float | bool | str


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: ``shape`` outermost dimension first, ``type`` as ggml calls it, ``offset`` from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself: plain values, lengths of arrays, tensors by name."""

    path: Path
    values: Mapping[str, Value]
    arrays: Mapping[str, int]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.values["general.architecture"])

    def number(self, key: str) -> int:
        """The positive integer ``<architecture>.<key>``; CheckpointError where it is missing or something else."""
        value = self.values.get(f"{self.architecture}.{key}")
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"{self.path}: {self.architecture}.{key} must be a positive integer, not {value!r}.")
        return value


def read_header(file: str | Path) -> GgufHeader:
    """Read a GGUF file's header; no tensor data is touched.

    Raises InputError where there is no such file, CheckpointError where the file is not GGUF, truncated or states
    counts, sizes or offsets beyond itself, UnsupportedError for other versions, byte orders or tensor types.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"import-gguf: {path} is not a file; give the path of a .gguf file.")
    try:
        with path.open("rb") as handle:
            if handle.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: is not a GGUF file (it does not start with the letters GGUF).")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error


class _Cursor:
    """A position in the mapped file that never moves past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 4

    def broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: broken GGUF header at byte {self.position}: {what}.")

    def skip(self, count: int) -> int:
        start = self.position
        if count > len(self.data) - start:
            raise self.broken(f"{count} bytes are announced, but the file ends after {len(self.data) - start}")
        self.position = start + count
        return start

    def scalar(self, form: str) -> int | float | bool:
        size = struct.calcsize(form)
        value: int | float | bool = struct.unpack_from(form, self.data, self.skip(size))[0]
        return value

    def integer(self, form: str) -> int:
        return int(self.scalar(form))

    def count(self, what: str, least_bytes: int) -> int:
        number = self.integer("<Q")
        if number > (len(self.data) - self.position) // least_bytes:
            raise self.broken(f"{number} {what} are announced, more than the file can hold")
        return number

    def string(self) -> str:
        length = self.integer("<Q")
        start = self.skip(length)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.broken("a string is not UTF-8") from error


def _parse(cursor: _Cursor) -> GgufHeader:
    version = cursor.integer("<I")
    if version not in _VERSIONS:
        raise UnsupportedError(
            f"{cursor.path}: GGUF version {version} is not supported; little-endian files of versions 2 and 3 are."
        )
    tensor_count = cursor.count("tensors", _MIN_TENSOR)
    pair_count = cursor.count("metadata entries", _MIN_PAIR)
    values: dict[str, Value] = {}
    arrays: dict[str, int] = {}
    for _ in range(pair_count):
        _read_pair(cursor, values, arrays)
    if not isinstance(values.get("general.architecture"), str):
        raise cursor.broken("general.architecture is missing")
    tensors = _read_tensors(cursor, tensor_count, values.get("general.alignment", 32))
    return GgufHeader(cursor.path, values, arrays, tensors)


def _read_pair(cursor: _Cursor, values: dict[str, Value], arrays: dict[str, int]) -> None:
    key = cursor.string()
    if key in values or key in arrays:
        raise cursor.broken(f"the key {key!r} appears twice")
    kind = cursor.integer("<I")
    if kind == _ARRAY:
        arrays[key] = _skip_array(cursor)
    elif kind == _STRING:
        values[key] = cursor.string()
    elif kind in _SCALARS:
        values[key] = cursor.scalar(_SCALARS[kind])
    else:
        raise cursor.broken(f"{key!r} has the unknown type {kind}")


def _skip_array(cursor: _Cursor) -> int:
    kind = cursor.integer("<I")
    if kind in _SCALARS:
        size = struct.calcsize(_SCALARS[kind])
        length = cursor.count("array elements", size)
        cursor.skip(length * size)
    elif kind == _STRING:
        length = cursor.count("strings", _MIN_STRING)
        for _ in range(length):
            cursor.skip(cursor.integer("<Q"))
    else:
        raise cursor.broken(f"an array holds elements of the unsupported type {kind}")
    return length


def _read_tensors(cursor: _Cursor, count: int, alignment: Value) -> dict[str, GgufTensor]:
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.broken(f"general.alignment must be a power of two, not {alignment!r}")
    entries = [_read_tensor(cursor) for _ in range(count)]
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    end = 0
    for entry in sorted(entries, key=lambda tensor: tensor.offset):
        if entry.name in tensors:
            raise cursor.broken(f"the tensor {entry.name!r} appears twice")
        if entry.offset % alignment or entry.offset < end:
            raise cursor.broken(f"the tensor {entry.name!r} is misaligned or overlaps another one")
        end = entry.offset + entry.nbytes
        if start + end > len(cursor.data):
            raise cursor.broken(f"the tensor {entry.name!r} ends at byte {start + end}, beyond the end of the file")
        tensors[entry.name] = GgufTensor(entry.name, entry.shape, entry.type, start + entry.offset, entry.nbytes)
    return tensors


def _read_tensor(cursor: _Cursor) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string()
    dims = cursor.integer("<I")
    if not 1 <= dims <= _MAX_DIMS:
        raise cursor.broken(f"the tensor {name!r} has {dims} dimensions, not 1 to {_MAX_DIMS}")
    shape = tuple(reversed([cursor.integer("<Q") for _ in range(dims)]))
    kind = cursor.integer("<I")
    offset = cursor.integer("<Q")
    if kind not in set(GGMLQuantizationType):
        raise UnsupportedError(
            f"{cursor.path}: the tensor {name!r} has the ggml type {kind}, which this version of the gguf package does "
            "not know; update it (`pip install -U gguf`)."
        )
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if 0 in shape or shape[-1] % block:
        raise cursor.broken(f"the tensor {name!r} has the shape {list(shape)}, its rows must be blocks of {block}")
    nbytes = math.prod(shape) // block * block_bytes
    return GgufTensor(name, shape, GGMLQuantizationType(kind).name, offset, nbytes)
