"""What each way to run a model takes beside its matrices: PyTorch's modules, and the engine in C++."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

from qtale import _core
from qtale.checkpoint.safetensors import ITEM_BYTES
from qtale.errors import InputError
from qtale.memory.shape import ModelShape

TORCH, ENGINE = "torch", "engine"
# A module's Python objects and the unused ends of the pages that its tensors lie on; measured.
MODULE_BYTES = 10 << 10
# Rows of one pass of the engine: enough to keep the kernels busy, few enough to stay in caches and to stop soon.
PASS_TOKENS = 512
# Inputs that share one activation scale of 4 bytes, and codes of an input: one in int8 products, two in int16 ones.
_ACTIVATION_GROUP, _MOST_CODES = 128, 2
# The engine keeps keys and values in pages of so many tokens with a header, weights in so many regions for each layer.
_PAGE_TOKENS, _PAGE_HEADER = 16, 64
_REGIONS = 4


@dataclass(frozen=True)
class Runtime:
    """Bytes of a model beside its Linears and its embedding.

    ``other`` is norms, biases and bookkeeping; ``kv_cache`` of a shape, context and batch is that many sequences' keys
    and values; ``workspace`` the most that forward passes over them hold beside all else.
    """

    other: Callable[[ModelShape], int]
    kv_cache: Callable[[ModelShape, int, int], int]
    workspace: Callable[[ModelShape, int, int], int]


def runtime(backend: str) -> Runtime:
    """The runtime of a name; InputError for other names."""
    if backend not in _RUNTIMES:
        raise InputError(f"memory: backend {backend!r} is not known; use {' or '.join(_RUNTIMES)}.")
    return _RUNTIMES[backend]


def _torch_other(shape: ModelShape) -> int:
    return shape.other_bytes + MODULE_BYTES * len(shape.linears)


def _torch_kv_cache(shape: ModelShape, context: int, batch: int) -> int:
    return batch * context * shape.num_layers * shape.kv_width * ITEM_BYTES[shape.dtype]


def _torch_workspace(shape: ModelShape, context: int, batch: int) -> int:
    """Measured: three tensors of the MLP's inner width, five of the attention's, codes, logits of the last token.

    Sampling widens the logits to float32. This counts what is in use: with the settings that it comes with, glibc's
    allocator may hold up to three times as much in gaps between pieces of the KV cache (MALLOC_MMAP_THRESHOLD_=65536
    in the environment keeps it from that).
    """
    item = ITEM_BYTES[shape.dtype]
    token = item * (3 * shape.intermediate_width + 5 * shape.attention_width) + _codes(shape)
    return batch * (context * token + shape.vocabulary * (item + 4))


def _engine_other(shape: ModelShape) -> int:
    """Vectors are float32; regions are whole pages, of which half of the last one is unused on average."""
    regions = 2 + _REGIONS * shape.num_layers
    return shape.other_bytes * 4 // ITEM_BYTES[shape.dtype] + regions * mmap.PAGESIZE // 2


def _engine_kv_cache(shape: ModelShape, context: int, batch: int) -> int:
    pages = batch * -(-context // _PAGE_TOKENS) * shape.num_layers
    return pages * (_PAGE_TOKENS * shape.kv_width * ITEM_BYTES[shape.dtype] + _PAGE_HEADER)


def _engine_workspace(shape: ModelShape, context: int, batch: int) -> int:
    """One pass: float32 rows of residual stream, attention and MLP, inputs of one product, logits of a row a sequence.

    Inputs are codes where weights are quantized, and float32 once more where they are not. Beside these, each
    thread takes a MiB or two, which grow with nothing but the size of attention heads.
    """
    row = 4 * (4 * shape.intermediate_width + 5 * shape.attention_width + shape.kv_width) + _codes(shape)
    return min(PASS_TOKENS, batch * context) * row + 4 * batch * shape.vocabulary


def _codes(shape: ModelShape) -> int:
    forms = 2 if _core.has_tiles() else 1
    return _MOST_CODES * (forms * shape.intermediate_width + 4 * shape.intermediate_width // _ACTIVATION_GROUP)


_RUNTIMES = {
    TORCH: Runtime(_torch_other, _torch_kv_cache, _torch_workspace),
    ENGINE: Runtime(_engine_other, _engine_kv_cache, _engine_workspace),
}
