"""What each way to run a model takes beside its matrices: PyTorch's modules, and the engine in C++."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

from qtale.checkpoint.safetensors import ITEM_BYTES
from qtale.errors import InputError
from qtale.memory.shape import ModelShape

TORCH, ENGINE = "torch", "engine"
# A module's Python objects and the unused ends of the pages that its tensors lie on; measured.
MODULE_BYTES = 10 << 10
# Rows of one pass of the engine: enough to keep the kernels busy, few enough to stay in caches and to stop soon.
PASS_TOKENS = 512
# Inputs that share one activation scale of 4 bytes in the int8 product.
_ACTIVATION_GROUP = 128
# The engine keeps keys and values in pages of so many tokens, and weights in so many regions for each layer.
_PAGE_TOKENS = 16
_REGIONS = 4


@dataclass(frozen=True)
class Runtime:
    """Bytes of a model beside its Linears and its embedding.

    ``other`` is norms, biases and bookkeeping; ``tokens`` how many of a sequence's tokens its KV cache has room for;
    ``workspace`` the most that forward passes over ``batch`` sequences of ``context`` tokens hold beside all else.
    """

    other: Callable[[ModelShape], int]
    tokens: Callable[[int], int]
    workspace: Callable[[ModelShape, int, int], int]


def runtime(backend: str) -> Runtime:
    """The runtime of a name; InputError for other names."""
    if backend not in _RUNTIMES:
        raise InputError(f"memory: backend {backend!r} is not known; use {' or '.join(_RUNTIMES)}.")
    return _RUNTIMES[backend]


def _torch_other(shape: ModelShape) -> int:
    return shape.other_bytes + MODULE_BYTES * len(shape.linears)


def _torch_workspace(shape: ModelShape, context: int, batch: int) -> int:
    """Measured: three tensors of the MLP's inner width, five of the attention's, int8 codes, logits of the last token.

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


def _engine_workspace(shape: ModelShape, context: int, batch: int) -> int:
    """One pass: float32 rows of the residual stream, attention and MLP, int8 codes, and a row of logits a sequence."""
    rows = min(PASS_TOKENS, batch * context)
    row = 4 * (3 * shape.intermediate_width + 5 * shape.attention_width + shape.kv_width) + _codes(shape)
    return rows * row + 4 * batch * shape.vocabulary


def _codes(shape: ModelShape) -> int:
    return shape.intermediate_width + 4 * shape.intermediate_width // _ACTIVATION_GROUP


_RUNTIMES = {
    TORCH: Runtime(_torch_other, lambda context: context, _torch_workspace),
    ENGINE: Runtime(_engine_other, lambda context: -(-context // _PAGE_TOKENS) * _PAGE_TOKENS, _engine_workspace),
}
