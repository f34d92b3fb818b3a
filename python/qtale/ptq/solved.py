"""Finished layers of a calibrated quantization, a safetensors file each, with checksums: what resumed runs trust."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale.errors import CheckpointError, Error
from qtale.files import checksum

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SolvedLayers:
    """A folder of layers as they will be stored: the tensors of packed modules, and norms that were changed."""

    folder: Path

    def path(self, index: int) -> Path:
        """The file of a layer."""
        return self.folder / f"layer-{index}.safetensors"

    def write(self, index: int, tensors: Mapping[str, torch.Tensor]) -> str:
        """Write a layer, whole or not at all, and return its checksum; Error where the disk does not take it."""
        from safetensors.torch import save_file

        path, partial = self.path(index), self.folder / f".layer-{index}.partial"
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            found = checksum(partial)
            partial.replace(path)
        # safetensors raises its own error for a full disk.
        except Exception as error:
            partial.unlink(missing_ok=True)
            raise Error(f"{path}: cannot be written: {error}; free some space and go on with --resume.") from error
        return found

    def check(self, index: int, expected: str) -> None:
        """Raise CheckpointError where a layer's file is not what was written."""
        if checksum(self.path(index)) != expected:
            raise CheckpointError(f"{self.path(index)}: is damaged; remove {self.folder} and start again.")

    @contextmanager
    def reading(self, count: int) -> Iterator[SolvedTensors]:
        """The tensors of layers 0 to ``count`` - 1 by name, read when they are asked for."""
        from safetensors import safe_open

        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(self.path(index), framework="pt")) for index in range(count)]
            yield SolvedTensors({name: file for file in files for name in file.keys()})  # noqa: SIM118 - no mapping


@dataclass(frozen=True)
class SolvedTensors:
    """Tensors of opened files by name."""

    files: Mapping[str, Any]

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.files[name].get_tensor(name)  # type: ignore[no-any-return]
