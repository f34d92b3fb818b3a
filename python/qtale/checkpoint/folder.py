"""A HuggingFace model folder, sharded or not: its config, its checked headers, and reads of one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qtale.checkpoint.hub import resolve
from qtale.checkpoint.index import INDEX_FILE, SINGLE_FILE, read_index, read_json_object
from qtale.checkpoint.safetensors import Shard, TensorInfo, read_header, read_raw, read_rows
from qtale.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"
_NUMPY_TYPES = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16"},
    **{"U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64"},
}
_TORCH_TYPES = {**_NUMPY_TYPES, "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


class ModelFolder:
    """An opened model folder; opening reads headers only, and tensors are read from disk when asked for."""

    def __init__(self, path: Path, config: Mapping[str, Any], shards: tuple[Shard, ...]) -> None:
        self.path = path
        self.config = config
        self.shards = shards
        self._shard_of = {name: shard for shard in shards for name in shard.tensors}
        self.tensors: Mapping[str, TensorInfo] = {name: info for s in shards for name, info in s.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def sharded(self) -> bool:
        """Whether the folder has an index of shards."""
        return len(self.shards) != 1 or self.shards[0].path.name != SINGLE_FILE

    def shard_of(self, name: str) -> Shard:
        """The shard that holds a tensor; raises CheckpointError where none does."""
        if name not in self._shard_of:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}.")
        return self._shard_of[name]

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor as uint8 [nbytes]."""
        shard = self.shard_of(name)
        return read_raw(shard.path, shard.tensors[name])

    def numpy(self, name: str) -> npt.NDArray[Any]:
        """A tensor as a numpy array of its own dtype; bfloat16, which numpy lacks, comes exactly widened to float32."""
        info = self.shard_of(name).tensors[name]
        if info.dtype == "BF16":
            wide = self.raw(name).view(np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32).reshape(info.shape)
        dtype = self._known(info, _NUMPY_TYPES)
        return self.raw(name).view(dtype).reshape(info.shape)

    def torch_rows(self, name: str, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Some rows of a matrix [rows, columns] as a torch CPU tensor of its own dtype; only they are read.

        Raises InputError for rows that it does not have, UnsupportedError for a dtype that torch lacks.
        """
        import torch

        shard = self.shard_of(name)
        info = shard.tensors[name]
        dtype = self._torch_dtype(info)
        raw = torch.from_numpy(read_rows(shard.path, info, rows).reshape(-1))
        return raw.view(dtype).reshape(len(rows), *info.shape[1:])

    def torch(self, name: str) -> torch.Tensor:
        """A tensor as a torch CPU tensor of its own dtype. Raises UnsupportedError for one that torch lacks."""
        import torch

        info = self.shard_of(name).tensors[name]
        dtype = self._torch_dtype(info)
        return torch.from_numpy(self.raw(name)).view(dtype).reshape(info.shape)

    def _torch_dtype(self, info: TensorInfo) -> Any:
        import torch

        return getattr(torch, self._known(info, _TORCH_TYPES))

    def _known(self, info: TensorInfo, types: Mapping[str, str]) -> str:
        if info.dtype not in types:
            raise UnsupportedError(
                f"{self.path}: tensor {info.name!r} has dtype {info.dtype}; supported are {', '.join(types)}."
            )
        return types[info.dtype]


def open_folder(model: str | Path) -> ModelFolder:
    """Open a model: a local folder, or a hub name whose files are downloaded once.

    Reads config.json and every safetensors header, and no tensor data. Raises CheckpointError for missing, broken or
    hostile files, UnsupportedError for pickle weights and NetworkError where the hub cannot be asked.
    """
    path = resolve(model)
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(f"{path}: has no {CONFIG_FILE}; this is not a HuggingFace model folder.")
    config = read_json_object(path / CONFIG_FILE)
    if (path / SINGLE_FILE).is_file():
        return ModelFolder(path, config, (read_header(path / SINGLE_FILE),))
    if (path / INDEX_FILE).is_file():
        return ModelFolder(path, config, _read_shards(path, read_index(path)))
    if any(path.glob("pytorch_model*.bin")):
        raise UnsupportedError(
            f"{path}: holds pickle weights (pytorch_model.bin), which can run code when read; convert them to "
            "safetensors with transformers' save_pretrained, then use that folder."
        )
    raise CheckpointError(f"{path}: has neither {SINGLE_FILE} nor {INDEX_FILE}.")


def _read_shards(path: Path, weight_map: Mapping[str, str]) -> tuple[Shard, ...]:
    shards = tuple(read_header(path / file) for file in sorted(set(weight_map.values())))
    for shard in shards:
        for name in shard.tensors:
            if weight_map.get(name) != shard.path.name:
                listed = f"says it lies in {weight_map[name]!r}" if name in weight_map else "does not list it"
                raise CheckpointError(f"{shard.path}: holds tensor {name!r}, but {INDEX_FILE} {listed}.")
    stored = {name for shard in shards for name in shard.tensors}
    for name, file in weight_map.items():
        if name not in stored:
            raise CheckpointError(f"{path / file}: lacks tensor {name!r}, which {INDEX_FILE} says it holds.")
    return shards
