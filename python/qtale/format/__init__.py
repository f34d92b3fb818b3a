"""compressed-tensors ``pack-quantized``: the layout on disk that transformers, vLLM and qtale share."""

from qtale.format.config import PackedConfig, build_config, parse_config
from qtale.format.tensors import PackedModule, packed_layout, packed_modules, packed_tensors, read_module

__all__ = [
    "PackedConfig",
    "PackedModule",
    "build_config",
    "packed_layout",
    "packed_modules",
    "packed_tensors",
    "parse_config",
    "read_module",
]
