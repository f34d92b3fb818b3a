"""The layout of a folder's weights: computed and checked from headers, before anything is read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qtale import _core, names
from qtale.checkpoint.folder import ModelFolder
from qtale.checkpoint.safetensors import STORED_FLOATS, TensorInfo
from qtale.engine.regions import FIXED, TILE, Layout, Source
from qtale.engine.spec import DecoderSpec
from qtale.errors import CheckpointError, InputError, UnsupportedError
from qtale.format.tensors import PACKED, SCALE, SHAPE, ZERO_POINT, packed_modules
from qtale.spec import QuantSpec, ResolvedSpec

_logger = logging.getLogger("qtale")

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
# Buffers that older transformers stored beside the weights.
_BUFFERS = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class WeightOptions:
    """How weights are changed while they are read: ``quantize`` a dense model, ``head_bits`` the head by itself.

    ``specs`` says it in place of both for each module by its full name; None and modules it lacks stay as stored.
    """

    quantize: QuantSpec | None = None
    head_bits: int | None = None
    specs: Mapping[str, ResolvedSpec | None] | None = None

    def __post_init__(self) -> None:
        if self.specs is not None and (self.quantize is not None or self.head_bits is not None):
            raise InputError("load: specs say how each module is rounded; leave out quantize and head_bits.")
        if self.head_bits not in (None, 4, 8):
            raise InputError(f"load: lm_head_bits {self.head_bits!r} is not supported; use 8, 4 or None.")

    @property
    def rounds(self) -> bool:
        """Whether any weight of the layers is rounded."""
        return self.quantize is not None or any(spec is not None for spec in (self.specs or {}).values())

    def spec_of(self, module: str, cols: int) -> ResolvedSpec | None:
        """What becomes of a Linear, the head among them; InputError for groups that do not divide ``cols``."""
        if self.specs is not None:
            return self.specs.get(module)
        chosen = self.quantize if module != HEAD else None if self.head_bits is None else QuantSpec(self.head_bits)
        return chosen.resolve(module, cols) if chosen else None


def plan_layout(folder: ModelFolder, spec: DecoderSpec, options: WeightOptions, compute: str = "int8") -> Layout:
    """The layout of a folder's weights for the kernels of this CPU.

    Matrices that stay floats are kept in bfloat16 where ``compute`` multiplies such numbers, but for an embedding; in
    tiles where the kernels of this CPU multiply them so.
    Raises CheckpointError where tensors are missing or do not fit config.json, InputError for options that do not fit
    the model, UnsupportedError for tensors of kinds that the engine does not read.
    """
    planner = _Planner(folder, spec, options, compute)
    planner.plan()
    planner.check_rest()
    return planner.layout


class _Planner:
    def __init__(self, folder: ModelFolder, spec: DecoderSpec, options: WeightOptions, compute: str) -> None:
        self.folder, self.spec, self.options, self.compute = folder, spec, options, compute
        self.packed = packed_modules(folder)
        self.layout = Layout(spec)
        self.used: set[str] = set()
        if self.packed and options.rounds:
            raise InputError(f"{folder.path}: is quantized already, so bits cannot be chosen; leave them out.")
        if EMBEDDING in self.packed:
            raise UnsupportedError(
                f"{folder.path}: {EMBEDDING} is quantized; the engine does not run that. Use qtale.load_torch for it."
            )

    def plan(self) -> None:
        spec = self.spec
        self._matrices(FIXED, "embedding", [self._source(EMBEDDING, spec.vocab_size, spec.hidden_size, None)])
        self._vector("final_norm", f"{FINAL_NORM}.weight", spec.hidden_size)
        for index in range(spec.num_layers):
            self._norms(index)
        self._head()
        for index in range(spec.num_layers):
            self._layer(index)

    def _head(self) -> None:
        rows, cols = self.spec.vocab_size, self.spec.hidden_size
        quantized = self.options.spec_of(HEAD, cols)
        if HEAD in self.packed and quantized:
            raise InputError(f"{self.folder.path}: its lm_head is quantized already; leave lm_head_bits out.")
        tied = self.spec.tied and HEAD not in self.packed
        if tied and quantized is None:
            self.layout.projections["head"] = [("embedding", None)]
            return
        self._project("head", [(self._source(EMBEDDING if tied else HEAD, rows, cols, quantized), False)])

    def _norms(self, index: int) -> None:
        spec, at, to = self.spec, f"model.layers.{index}", f"layers.{index}"
        self._vector(f"{to}.input_norm", f"{at}.input_layernorm.weight", spec.hidden_size)
        self._vector(f"{to}.post_norm", f"{at}.post_attention_layernorm.weight", spec.hidden_size)
        if spec.qk_norm:
            for name in ("q_norm", "k_norm"):
                self._vector(f"{to}.{name}", f"{at}.self_attn.{name}.weight", spec.head_dim)

    def _layer(self, index: int) -> None:
        spec, at, to = self.spec, f"model.layers.{index}", f"layers.{index}"
        hidden, between, kv = spec.hidden_size, spec.intermediate_size, spec.kv_width
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        inputs = {"q_proj": spec.query_width, "k_proj": kv, "v_proj": kv}
        qkv = [(self._linear(f"{attention}.{part}", rows, hidden), spec.qkv_bias) for part, rows in inputs.items()]
        gate_up = [(self._linear(f"{mlp}.{part}_proj", between, hidden), spec.mlp_bias) for part in ("gate", "up")]
        self._project(f"{to}.qkv", qkv)
        self._project(f"{to}.o", [(self._linear(f"{attention}.o_proj", hidden, spec.query_width), spec.o_bias)])
        self._project(f"{to}.gate_up", gate_up)
        self._project(f"{to}.down", [(self._linear(f"{mlp}.down_proj", hidden, between), spec.mlp_bias)])

    def _linear(self, module: str, rows: int, cols: int) -> Source:
        return self._source(module, rows, cols, self.options.spec_of(module, cols))

    def _source(self, module: str, rows: int, cols: int, quantize: ResolvedSpec | None) -> Source:
        packed = self.packed.get(module)
        if packed is not None:
            found, dtype, nbytes = (packed.out_features, packed.in_features), packed.dtype, packed.nbytes
            self.used.update(f"{module}.{suffix}" for suffix in (PACKED, SCALE, SHAPE, ZERO_POINT))
        else:
            info = self._tensor(f"{module}.weight")
            found, dtype, nbytes = info.shape, info.dtype, info.nbytes  # type: ignore[assignment]
        if found != (rows, cols):
            raise CheckpointError(
                f"{self.folder.path}: {module} has shape {list(found)} where config.json needs [{rows}, {cols}]."
            )
        spec, stored = packed.spec if packed else quantize, STORED_FLOATS[dtype]
        rounds = self.compute == "bfloat16" and spec is None and module != EMBEDDING
        if rounds and cols % 2:
            raise InputError(
                f"{self.folder.path}: {module} takes {cols} inputs, but bfloat16 numbers are multiplied by pairs; load "
                "it with compute 'float'."
            )
        tiled = rounds and _core.has_tiles() and rows % TILE[0] == 0 and cols % TILE[1] == 0
        return Source(module, rows, cols, "bfloat16" if rounds else stored, spec, packed, nbytes, stored, tiled)

    def _tensor(self, name: str) -> TensorInfo:
        self.used.add(name)
        info = self.folder.shard_of(name).tensors[name]
        if info.dtype not in STORED_FLOATS:
            raise UnsupportedError(
                f"{self.folder.path}: {name} has dtype {info.dtype}; the engine reads {', '.join(STORED_FLOATS)}. Use "
                "qtale.load_torch for it."
            )
        return info

    def _vector(self, block: str, name: str, size: int) -> None:
        self._check_vector(name, size)
        self.layout.add(FIXED, block, 4 * size, vectors=((name, size),))

    def _check_vector(self, name: str, size: int) -> None:
        info = self._tensor(name)
        if info.shape != (size,):
            raise CheckpointError(
                f"{self.folder.path}: {name} has shape {list(info.shape)} where config.json needs [{size}]."
            )

    def _project(self, name: str, parts: Sequence[tuple[Source, bool]]) -> None:
        """Blocks for matrices that read one input: neighbours of one kind become one matrix."""
        found: list[list[tuple[Source, bool]]] = []
        for source, biased in parts:
            if found and found[-1][0][0].kind == source.kind:
                found[-1].append((source, biased))
            else:
                found.append([(source, biased)])
        self.layout.projections[name] = []
        for number, members in enumerate(found):
            block = f"{name}.{number}"
            self._matrices(name, block, [source for source, _ in members])
            bias = f"{block}.bias" if any(biased for _, biased in members) else None
            if bias:
                self._bias(name, bias, members)
            self.layout.projections[name].append((block, bias))

    def _bias(self, region: str, block: str, members: Iterable[tuple[Source, bool]]) -> None:
        vectors = tuple((f"{s.module}.bias" if biased else None, s.rows) for s, biased in members)
        for name, size in vectors:
            if name is not None:
                self._check_vector(name, size)
        self.layout.add(region, block, 4 * sum(size for _, size in vectors), vectors=vectors)

    def _matrices(self, region: str, block: str, sources: Sequence[Source]) -> None:
        first, rows = sources[0], sum(source.rows for source in sources)
        if first.spec is None:
            nbytes = sum(source.dense_nbytes for source in sources)
        else:
            groups = first.spec.groups(first.cols)
            nbytes = _core.prepacked_bytes(
                rows, first.cols, groups, first.spec.num_bits, first.spec.symmetric, first.dtype
            )
        self.layout.add(region, block, nbytes, sources=tuple(sources))

    def check_rest(self) -> None:
        """Tensors that no part of the decoder takes: too many layers are an error, others are named in the log."""
        known = {f"{HEAD}.weight"} if self.spec.tied else set()
        rest = [name for name in self.folder.tensors if name not in self.used | known and not name.endswith(_BUFFERS)]
        for name in rest:
            block = names.block_index(name)
            if name.startswith("model.layers.") and block is not None and block >= self.spec.num_layers:
                raise CheckpointError(
                    f"{self.folder.path}: holds {name}, but config.json has {self.spec.num_layers} layers."
                )
        if rest:
            _logger.warning("%s: %d tensors are not used, %s the first", self.folder.path, len(rest), rest[0])
