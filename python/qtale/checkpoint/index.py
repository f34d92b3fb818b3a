"""The JSON files of a model folder: config.json and the index that says which shard holds which tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qtale.checkpoint.safetensors import MAX_HEADER_BYTES
from qtale.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CheckpointError where it is missing, too large or something else."""
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: is larger than {MAX_HEADER_BYTES} bytes, which no model needs.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}.")
    return value


def read_index(folder: Path) -> dict[str, str]:
    """The ``weight_map`` of a sharded folder: tensor name → file name; every file lies in the folder itself."""
    path = folder / INDEX_FILE
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: must hold a 'weight_map' that names the file of each tensor.")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or not _is_plain_name(file):
            raise CheckpointError(
                f"{path}: tensor {tensor!r} lies in {file!r}; a shard must be a .safetensors file in the same folder."
            )
    return weight_map


def _is_plain_name(file: str) -> bool:
    return file.isprintable() and not file.startswith(".") and not set(file) & set('/\\:*?[]"')
