"""What tells one model from another without reading it: shapes of the architecture and a few bytes of every tensor."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from qtale.checkpoint.folder import ModelFolder, open_folder
from qtale.checkpoint.safetensors import TensorInfo
from qtale.errors import CheckpointError

# Fields that change what the weights mean; names, versions and generation settings do not.
_ARCHITECTURE = (
    *("model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "rms_norm_eps", "tie_word_embeddings"),
)
_SAMPLES = 4
_SAMPLE_BYTES = 16


def fingerprint(model: ModelFolder | str | Path) -> str:
    """A sha256 (64 hexadecimal digits) over the architecture of config.json and every tensor of a model folder.

    Of each tensor its name, dtype, shape and at most 64 bytes at four places count, so no shard is read whole and a
    model that is split into other shards keeps its fingerprint. Raises as :func:`qtale.checkpoint.open_folder` does.
    """
    folder = model if isinstance(model, ModelFolder) else open_folder(model)
    digest = hashlib.sha256(_architecture(folder.config))
    described = {}
    for shard in folder.shards:
        try:
            with shard.path.open("rb", buffering=0) as file:
                described.update({info.name: _describe(file, info) for info in shard.tensors.values()})
        except OSError as error:
            raise CheckpointError(f"{shard.path}: cannot be read: {error.strerror or error}.") from error
    for name in sorted(described):
        digest.update(described[name])
    return digest.hexdigest()


def config_fingerprint(config: Mapping[str, Any]) -> str:
    """``config-`` and a sha256 over the architecture of a config.json without weights: no model folder has this one."""
    return f"config-{hashlib.sha256(_architecture(config)).hexdigest()}"


def _architecture(config: Mapping[str, Any]) -> bytes:
    return json.dumps({key: config.get(key) for key in _ARCHITECTURE}, sort_keys=True).encode()


def _describe(file: BinaryIO, info: TensorInfo) -> bytes:
    head = json.dumps([info.name, info.dtype, info.shape]).encode()
    size = min(info.nbytes, _SAMPLE_BYTES)
    last = info.nbytes - size
    places = sorted({info.start + last * step // (_SAMPLES - 1) for step in range(_SAMPLES)})
    return head + b"".join(os.pread(file.fileno(), size, place) for place in places)
