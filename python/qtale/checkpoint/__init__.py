"""HuggingFace model folders: opened and checked before use, read tensor by tensor, written whole or not at all."""

from qtale.checkpoint.folder import ModelFolder, open_folder
from qtale.checkpoint.hub import resolve
from qtale.checkpoint.identity import fingerprint
from qtale.checkpoint.output import output_folder
from qtale.checkpoint.safetensors import Shard, TensorInfo, read_header
from qtale.checkpoint.writer import ShardWriter

__all__ = [
    "ModelFolder",
    "Shard",
    "ShardWriter",
    "TensorInfo",
    "fingerprint",
    "open_folder",
    "output_folder",
    "read_header",
    "resolve",
]
