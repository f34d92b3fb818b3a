"""Writes one safetensors file whose tensors are known by shape beforehand: nothing is held in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qtale.checkpoint.safetensors import ITEM_BYTES, Shard, TensorInfo
from qtale.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch

_COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorShape:
    """A tensor to be written: ``dtype`` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        count = ITEM_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


class ShardWriter:
    """A context manager: the header is written at once, tensors in any order, and leaving it flushes to the disk."""

    def __init__(self, path: Path, tensors: Iterable[TensorShape], metadata: Mapping[str, str]) -> None:
        # The widest dtypes first keep every tensor aligned, as the reference implementation orders them.
        ordered = sorted(tensors, key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.name))
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        position = 0
        for tensor in ordered:
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.nbytes],
            }
            position += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._path = path
        self._start = 8 + len(text)
        self._header = len(text).to_bytes(8, "little") + text
        self._offsets = {t.name: header[t.name]["data_offsets"] for t in ordered}
        self._missing = set(self._offsets)

    def __enter__(self) -> ShardWriter:
        self._file = self._path.open("wb")
        self._file.write(self._header)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def _finish(self) -> None:
        if self._missing:
            raise InputError(f"write {self._path.name}: {len(self._missing)} tensors were announced but not written.")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _seek(self, name: str, nbytes: int) -> None:
        begin, end = self._offsets[name]
        if nbytes != end - begin:
            raise InputError(f"write {name}: {nbytes} bytes were given where {end - begin} were announced.")
        self._missing.discard(name)
        self._file.seek(self._start + begin)

    def write(self, name: str, value: npt.NDArray[Any] | torch.Tensor) -> None:
        """Write one tensor (numpy or torch CPU) of the announced dtype and shape."""
        if isinstance(value, np.ndarray):
            data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        else:
            import torch

            data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._seek(name, data.nbytes)
        self._file.write(data.data)

    def copy(self, source: Shard, info: TensorInfo) -> None:
        """Copy one tensor from another file as it is, in pieces of 16 MiB."""
        self._seek(info.name, info.nbytes)
        with source.path.open("rb") as file:
            file.seek(info.start)
            left = info.nbytes
            while left:
                piece = file.read(min(left, _COPY_BYTES))
                if not piece:
                    raise CheckpointError(f"{source.path}: ended while {info.name!r} was copied; the file changed.")
                self._file.write(piece)
                left -= len(piece)
