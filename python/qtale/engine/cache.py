"""The arena on disk: one safetensors file that a second load reads as it is.

A file belongs to one model (its fingerprint), kernel layout and choice of options; anything that does not fit, or whose
sums differ, is ignored and written anew. A cache takes as much of the disk as the model takes of the memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qtale import _core
from qtale.checkpoint.folder import ModelFolder
from qtale.checkpoint.identity import fingerprint
from qtale.checkpoint.safetensors import Shard, read_header
from qtale.checkpoint.writer import ShardWriter, TensorShape
from qtale.engine.arena import Arena
from qtale.engine.regions import Layout
from qtale.errors import CheckpointError, InputError

_logger = logging.getLogger("qtale")

VERSION = 1
AUTO = "auto"
_TENSOR = "arena"
# Small enough that a piece is summed while it lies in the processor's cache.
_PIECE = 1 << 20
_STRETCH = 16 * _PIECE  # what a thread reads at a time


def cache_folder(cache: str | Path) -> Path:
    """The folder of a choice: ``"auto"`` is "engine" in qtale's part of HuggingFace's asset cache.

    Raises InputError where a folder that was given does not exist and cannot be made.
    """
    try:
        if cache == AUTO:
            import huggingface_hub

            return Path(huggingface_hub.cached_assets_path("qtale", "engine", str(VERSION)))
        folder = Path(cache).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cache {str(cache)!r}: the folder cannot be made: {error.strerror or error}.") from error
    return folder


class PackedCache:
    """The file of one model and layout in a cache folder."""

    def __init__(self, cache: str | Path, folder: ModelFolder, layout: Layout) -> None:
        described = json.dumps(layout.describe()).encode()
        self._metadata = {
            "format": f"qtale-engine-{VERSION}",
            "model": fingerprint(folder),
            "files": _file_times(folder),
            "kernels": _core.cpu_isa(),
            "layout": hashlib.sha256(described).hexdigest(),
        }
        # Two ways to load one model have files of their own; a model that changed takes the place of what it was.
        named = [str(folder.path.resolve()), self._metadata["layout"], self._metadata["kernels"]]
        key = hashlib.sha256(json.dumps(named).encode()).hexdigest()
        self.path = cache_folder(cache) / f"{folder.path.resolve().name[:64]}-{key[:16]}.safetensors"

    def read(self, arena: Arena) -> bool:
        """Fill the arena; False where there is no file that fits, which the log then explains."""
        if not self.path.is_file():
            return False
        try:
            shard = read_header(self.path)
            self._check(shard, arena)
            found = _read_summed(shard, arena.bytes)
            if found != shard.metadata["sums"]:
                raise CheckpointError(f"{self.path}: its sums differ.")
        except (CheckpointError, OSError) as error:
            _logger.warning("the packed weights in the cache are not used and written anew: %s", error)
            # Nothing of it may stay between the blocks.
            arena.bytes.fill(0)
            return False
        return True

    def write(self, arena: Arena) -> None:
        """Write the file whole; where that fails, the log says so and nothing is left behind."""
        temporary = None
        try:
            handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.parent)
            os.close(handle)
            temporary = Path(name)
            metadata = {**self._metadata, "sums": _sums(arena.bytes)}
            with ShardWriter(temporary, [TensorShape(_TENSOR, "U8", (arena.nbytes,))], metadata) as writer:
                writer.write(_TENSOR, arena.bytes)
            temporary.replace(self.path)
        except OSError as error:
            _logger.warning("the packed weights are not kept for the next load: %s", error)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def _check(self, shard: Shard, arena: Arena) -> None:
        info = shard.tensors.get(_TENSOR)
        if info is None or info.dtype != "U8" or info.shape != (arena.nbytes,) or "sums" not in shard.metadata:
            raise CheckpointError(f"{self.path}: does not hold {arena.nbytes} bytes of packed weights.")
        for key, value in self._metadata.items():
            if shard.metadata.get(key) != value:
                raise CheckpointError(f"{self.path}: its {key} is another one.")


def _file_times(folder: ModelFolder) -> str:
    """Changes when a shard is written again, of which a fingerprint samples a few bytes only."""
    states = [(shard.path.name, shard.path.stat()) for shard in folder.shards]
    return hashlib.sha256(json.dumps([[name, s.st_size, s.st_mtime_ns] for name, s in states]).encode()).hexdigest()


def _read_summed(shard: Shard, target: npt.NDArray[np.uint8]) -> str:
    """Read the tensor into ``target`` over all threads and return its sums."""
    offset = shard.tensors[_TENSOR].start
    starts = range(0, target.size, _STRETCH)
    with shard.path.open("rb", buffering=0) as file:

        def read(start: int) -> list[int]:
            return [
                _read_piece(file, offset + at, target[at : at + _PIECE])
                for at in range(start, min(start + _STRETCH, target.size), _PIECE)
            ]

        if (count := _core.num_threads()) == 1:
            return _digest(list(chain.from_iterable(map(read, starts))))
        with ThreadPoolExecutor(count) as threads:
            return _digest(list(chain.from_iterable(threads.map(read, starts))))


def _read_piece(file: io.FileIO, offset: int, piece: npt.NDArray[np.uint8]) -> int:
    """Read a piece that begins at ``offset`` of the file and return its sum."""
    done = 0
    while done < piece.size:
        count = os.preadv(file.fileno(), [piece.data[done:]], offset + done)
        if not count:
            raise CheckpointError(f"{file.name!s}: ended early.")
        done += count
    return _sum(piece)


def _sums(data: npt.NDArray[np.uint8]) -> str:
    return _digest([_sum(data[start : start + _PIECE]) for start in range(0, data.size, _PIECE)])


def _sum(piece: npt.NDArray[np.uint8]) -> int:
    whole = piece.size // 8 * 8
    return int(piece[:whole].view(np.uint64).sum(dtype=np.uint64)) ^ int(piece[whole:].sum(dtype=np.uint64))


def _digest(sums: list[int]) -> str:
    return hashlib.sha256(np.array(sums, dtype=np.uint64).tobytes()).hexdigest()
