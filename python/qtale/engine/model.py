"""A loaded model: the memory of its weights, and decoders of the core over them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale import _core
from qtale.checkpoint.folder import ModelFolder
from qtale.engine.arena import Arena, memory_of
from qtale.engine.cache import PackedCache
from qtale.engine.layout import WeightOptions, plan_layout
from qtale.engine.regions import FIXED, Block, Layout
from qtale.engine.spec import DecoderSpec, read_spec
from qtale.engine.weights import check_memory, read_weights
from qtale.errors import CheckpointError, InputError
from qtale.routing import KV_RULES, Routing, read_routing
from qtale.spec import ENGINE_COMPUTE, NUM_BITS
from qtale.tensors import memory

if TYPE_CHECKING:
    from qtale.tensors import Memory

    Part = tuple[Memory, Memory | None]

_logger = logging.getLogger("qtale")

INT8_KEYS = "int8-keys"
KV_DTYPES = ("auto", "float16", "float32", INT8_KEYS)
_MAX_CONTEXT = 1 << 30
# The most that the core's set_num_threads takes.
_MAX_THREADS = 1024


@dataclass(frozen=True)
class LoadOptions:
    """How a decoder runs; see :func:`qtale.load`."""

    compute: str = "int8"
    context: int | None = None
    kv_dtype: str = "auto"
    kv_rule: str | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.compute not in ENGINE_COMPUTE:
            raise InputError(f"load: compute {self.compute!r} is not known; use {', '.join(ENGINE_COMPUTE)}.")
        if self.compute == "bfloat16" and not _core.has_bfloat16():
            raise InputError(
                f"load: compute 'bfloat16' needs a CPU that multiplies such numbers (AVX-512 BF16), but the kernels in "
                f"use are {_core.cpu_isa()}; use 'float'."
            )
        if self.kv_rule is not None and self.kv_rule not in KV_RULES:
            raise InputError(f"load: kv_rule {self.kv_rule!r} is not known; use {' or '.join(KV_RULES)}.")
        if self.kv_dtype not in KV_DTYPES:
            raise InputError(f"load: kv_dtype {self.kv_dtype!r} is not known; use {', '.join(KV_DTYPES)}.")
        if self.context is not None and not (type(self.context) is int and 0 < self.context <= _MAX_CONTEXT):
            raise InputError(f"load: context {self.context!r} must be a number of tokens from 1 to {_MAX_CONTEXT}.")
        if self.num_threads is not None and not (
            type(self.num_threads) is int and 0 < self.num_threads <= _MAX_THREADS
        ):
            raise InputError(
                f"load: num_threads {self.num_threads!r} is not a number of threads; use 1 to {_MAX_THREADS}, or None."
            )


@dataclass(frozen=True)
class LoadReport:
    """What loading did: bytes of the weights in memory, seconds, and whether they came from the cache."""

    weights_bytes: int
    seconds: float
    from_cache: bool


def _check_keys(kv_dtype: str, head_dim: int) -> None:
    if kv_dtype == INT8_KEYS and not _core.has_int8_keys(head_dim):
        raise InputError(
            f"load: kv_dtype {INT8_KEYS!r} needs a CPU with AVX-512 BF16 and a head_dim that is a power of two from 16 "
            f"to 256, but the kernels in use are {_core.cpu_isa()} and head_dim is {head_dim}; use 'float16'."
        )


class LoadedModel:
    """Weights of one folder; ``arena`` is what loading filled, of which regions may move away."""

    def __init__(
        self,
        folder: ModelFolder,
        weights: WeightOptions,
        options: LoadOptions,
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        start = time.perf_counter()
        where = str(folder.path)
        self.spec: DecoderSpec = read_spec(folder.config, where)
        _check_keys(options.kv_dtype, self.spec.head_dim)
        found = read_routing(folder.path, self.spec.num_layers, self.spec.hidden_size)
        self.routing: Routing = found or Routing()
        self.layout: Layout = plan_layout(folder, self.spec, weights, options.compute)
        self.options = options
        self.context = options.context or self.spec.positions
        if self.context > self.spec.positions and not self.spec.rope.dynamic_length:
            _logger.warning(
                "%s: context %d is beyond the %d positions the model was made for", where, self.context,
                self.spec.positions,
            )  # fmt: skip
        kept = PackedCache(cache, folder, self.layout) if cache is not None else None
        check_memory(self.layout, where)
        self.arena = Arena(self.layout.nbytes)
        from_cache = kept is not None and kept.read(self.arena)
        if not from_cache:
            read_weights(folder, self.layout, self.arena, progress)
            if kept is not None:
                kept.write(self.arena)
        self._homes = {name: (self.arena, region.offset) for name, region in self.layout.regions.items()}
        self._where = where
        self.report = LoadReport(self.layout.nbytes, time.perf_counter() - start, from_cache)

    @property
    def kv_dtype(self) -> str:
        """What keys and values are kept in; of the choices but "auto"."""
        if self.options.kv_dtype != "auto":
            return self.options.kv_dtype
        if self.layout.blocks["embedding"].sources[0].dtype == "float32":
            return "float32"
        rounds = self.options.compute == "int8" and max(self.layout.bits) <= max(NUM_BITS)
        # The reference kernels have such keys, too, but stand for what other CPUs compute.
        fast = _core.has_bfloat16() and _core.has_int8_keys(self.spec.head_dim)
        return INT8_KEYS if rounds and fast else "float16"

    def move(self, region: str, layout: Layout, arena: Arena, offset: int) -> None:
        """Let a region be what it is in another layout, at ``offset`` of ``arena``; its old memory is given back.

        No decoder made before may be used afterwards.
        """
        (old, at), nbytes = self._homes[region], self.layout.regions[region].nbytes
        self.layout.take(region, layout)
        self._homes[region] = arena, offset
        old.release(at, nbytes)

    def make_decoder(self) -> _core.Decoder:
        """A decoder over the weights as they lie now; CheckpointError where they do not fit each other."""
        try:
            decoder = _core.Decoder(
                self._config(),
                self._memory("embedding", FIXED),
                self._memory("final_norm", FIXED),
                self._parts("head")[0],
                [self._layer(index) for index in range(self.spec.num_layers)],
            )
        except InputError as error:
            raise CheckpointError(f"{self._where}: its weights give no decoder: {error}") from error
        decoder.set_theta(self.routing.theta)
        decoder.set_forced_tokens(self.routing.forced_tokens)
        decoder.set_num_threads(self.options.num_threads or 0)
        return decoder

    def _config(self) -> dict[str, Any]:
        spec, rope = self.spec, self.spec.rope
        return {
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "num_heads": spec.num_heads,
            "num_kv_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "vocab_size": spec.vocab_size,
            "context": self.context,
            "norm_eps": spec.norm_eps,
            "attention_scale": spec.head_dim**-0.5,
            "inv_freq": list(rope.inv_freq),
            "attention_factor": rope.attention_factor,
            "dynamic_base": rope.dynamic_base,
            "dynamic_factor": rope.dynamic_factor,
            "dynamic_length": rope.dynamic_length,
            "compute": self.options.compute,
            "kv_dtype": "int8" if self.kv_dtype == INT8_KEYS else self.kv_dtype,
            "kv_rule": self.options.kv_rule or self.routing.kv_rule,
        }

    def _layer(self, index: int) -> dict[str, Any]:
        at = f"layers.{index}"
        layer: dict[str, Any] = {
            "input_norm": self._memory(f"{at}.input_norm", FIXED),
            "post_norm": self._memory(f"{at}.post_norm", FIXED),
            "window": self.spec.windows[index],
            "router": self._router(index),
        }
        if self.spec.qk_norm:
            layer |= {name: self._memory(f"{at}.{name}", FIXED) for name in ("q_norm", "k_norm")}
        return layer | {name: self._parts(f"{at}.{name}") for name in ("qkv", "o", "gate_up", "down")}

    def _router(self, index: int) -> dict[str, Any] | None:
        router = self.routing.routers.get(index)
        if router is None:
            return None
        return {"norm_eps": router.norm_eps} | {name: memory(array) for name, array in router.tensors().items()}

    def _parts(self, projection: str) -> list[Part]:
        # A tied head is the embedding, which lies among what never changes.
        region = projection if projection in self.layout.regions else FIXED
        return [
            (self._memory(weight, region), None if bias is None else self._memory(bias, region))
            for weight, bias in self.layout.projections[projection]
        ]

    def _memory(self, name: str, region: str) -> Memory:
        block, (arena, home) = self.layout.blocks[name], self._homes[region]
        offset = home + block.offset - self.layout.regions[region].offset
        return memory_of(arena.view(offset, block.nbytes), *_form(block))


def _form(block: Block) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a block as the core sees it."""
    if block.vectors:
        return "float32", (block.nbytes // 4,)
    if block.sources[0].spec is not None:
        return "uint8", (block.nbytes,)
    return block.sources[0].dtype, block.dense_shape
