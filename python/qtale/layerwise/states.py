"""Hidden states of all calibration sequences, by name: in memory, or in files where memory is short or runs resume."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qtale.errors import CheckpointError, Error
from qtale.files import checksum

if TYPE_CHECKING:
    import torch

    Write = Callable[[torch.Tensor], None]

# Bytes of hidden states in memory, where a caller says nothing else; more of them lie in files.
MAX_MEMORY = 256 << 20


class States(Protocol):
    """Named arrays float32 [count, length, width], written once from the first sequence to the last."""

    def writing(self, name: str) -> AbstractContextManager[Write]:
        """A context in which sequences [n, length, width] are appended; the array exists when it is left."""

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Sequences ``start`` to ``stop`` of an array, [stop - start, length, width]."""

    def drop(self, name: str) -> None:
        """Forget an array, whether it exists or not."""

    def seal(self, name: str) -> str:
        """A checksum of an array that a later run can compare; empty where no later run finds it."""


class MemoryStates:
    """Arrays in memory."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[torch.Tensor]] = {}

    @contextmanager
    def writing(self, name: str) -> Iterator[Write]:
        pieces: list[torch.Tensor] = []
        yield pieces.append
        self._pieces[name] = pieces

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        wanted, position = [], 0
        for piece in self._pieces[name]:
            first, last = max(start - position, 0), min(stop - position, len(piece))
            if first < last:
                wanted.append(piece[first:last])
            position += len(piece)
        return wanted[0] if len(wanted) == 1 else torch.cat(wanted)

    def drop(self, name: str) -> None:
        self._pieces.pop(name, None)

    def seal(self, name: str) -> str:
        return ""


class FileStates:
    """Arrays as raw files of a folder; each appears whole or not at all.

    ``row_shape`` (length, hidden) is that of arrays which another run wrote; ``durable`` ones outlive a crash.
    """

    def __init__(self, folder: Path, row_shape: tuple[int, int], durable: bool = True) -> None:
        self._folder, self._row_shape, self._durable = folder, row_shape, durable
        self._shapes: dict[str, tuple[int, ...]] = {}

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.f32"

    @contextmanager
    def writing(self, name: str) -> Iterator[Write]:
        partial = self._folder / f".{name}.partial"
        try:
            with partial.open("wb") as file:

                def append(states: torch.Tensor) -> None:
                    self._shapes[name] = tuple(states.shape[1:])
                    states.contiguous().numpy().tofile(file)

                yield append
                file.flush()
                if self._durable:
                    os.fsync(file.fileno())
            partial.replace(self._path(name))
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise Error(
                f"hidden states cannot be written to {self._folder}: {error.strerror or error}; free some "
                "space, or set TMPDIR to a larger disk."
            ) from error

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        length, width = self._shapes.get(name, self._row_shape)
        # Memory of torch is aligned for its kernels, so that products are the same bits as with states in memory.
        values = torch.empty(stop - start, length, width)
        try:
            with self._path(name).open("rb") as file:
                file.seek(start * length * width * 4)
                count = file.readinto(values.numpy().data.cast("B"))
        except OSError as error:
            raise CheckpointError(f"{self._path(name)}: cannot be read: {error.strerror or error}.") from error
        if count != values.nbytes:
            raise CheckpointError(f"{self._path(name)}: is truncated; remove {self._folder} and start again.")
        return values

    def drop(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def seal(self, name: str) -> str:
        return checksum(self._path(name))


@contextmanager
def open_states(
    resume: Path | None, row_shape: tuple[int, int], nbytes: int, max_memory: int
) -> Iterator[MemoryStates | FileStates]:
    """States for a run that will hold ``nbytes`` of them: in ``resume`` if given, else in memory up to ``max_memory``.

    Larger ones go to a folder inside the system's temporary one (``TMPDIR``), which is removed at the end.
    """
    if resume is not None:
        yield FileStates(resume, row_shape)
    elif nbytes <= max_memory:
        yield MemoryStates()
    else:
        folder = _temporary(nbytes)
        try:
            yield FileStates(folder, row_shape, durable=False)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _temporary(nbytes: int) -> Path:
    parent = Path(tempfile.gettempdir())
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise Error(
            f"the hidden states need {nbytes} bytes, but {parent} has {free} free; set TMPDIR to a larger "
            "disk, or take fewer or shorter sequences."
        )
    return Path(tempfile.mkdtemp(prefix="qtale-states-"))
