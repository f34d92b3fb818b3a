"""Finished layers of a calibrated quantization, a safetensors file each, with checksums: what resumed runs trust."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
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

    def path(self, name: str) -> Path:
        """The file of a layer, or of what was done to all of them."""
        return self.folder / f"{name}.safetensors"

    def write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> str:
        """Write tensors, whole or not at all, and return its checksum; Error where the disk does not take it."""
        from safetensors.torch import save_file

        path, partial = self.path(name), self.folder / f".{name}.partial"
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            found = checksum(partial)
            partial.replace(path)
        # safetensors raises its own error for a full disk.
        except Exception as error:
            partial.unlink(missing_ok=True)
            raise Error(f"{path}: cannot be written: {error}; free some space and go on with --resume.") from error
        return found

    def check(self, name: str, expected: str) -> None:
        """Raise CheckpointError where a file is not what was written."""
        if checksum(self.path(name)) != expected:
            raise CheckpointError(f"{self.path(name)}: is damaged; remove {self.folder} and start again.")

    @contextmanager
    def reading(self, files: Sequence[str]) -> Iterator[SolvedTensors]:
        """The tensors of files by name, of the last file that has one; read when they are asked for."""
        from safetensors import safe_open

        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(self.path(name), framework="pt")) for name in files]
            yield SolvedTensors({name: file for file in opened for name in file.keys()})  # noqa: SIM118 - no mapping


@dataclass(frozen=True)
class SolvedTensors(Mapping[str, "torch.Tensor"]):
    """Tensors of opened files by name."""

    files: Mapping[str, Any]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.files[name].get_tensor(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
