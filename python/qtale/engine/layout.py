"""Where every weight of a decoder lies in its arena: computed and checked from headers, before anything is read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qtale import _core, names
from qtale.checkpoint.folder import ModelFolder
from qtale.checkpoint.safetensors import TensorInfo
from qtale.engine.arena import aligned
from qtale.engine.spec import DecoderSpec
from qtale.errors import CheckpointError, InputError, UnsupportedError
from qtale.format.tensors import PACKED, SCALE, SHAPE, ZERO_POINT, PackedModule, packed_modules
from qtale.spec import QuantSpec, ResolvedSpec

_logger = logging.getLogger("qtale")

CORE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
# Buffers that older transformers stored beside the weights.
_BUFFERS = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Source:
    """A matrix on disk: ``spec`` says how it is, or is to be, quantized; ``dtype`` is of its scales, or its own."""

    module: str
    rows: int
    cols: int
    dtype: str
    spec: ResolvedSpec | None
    packed: PackedModule | None
    nbytes: int

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for matrices that can be one, their rows side by side."""
        if self.spec is None:
            return (self.dtype,)
        return (self.dtype, self.spec.num_bits, self.spec.groups(self.cols), self.spec.symmetric)


@dataclass(frozen=True)
class Block:
    """A slice of the arena: the rows of ``sources`` as one matrix, or ``vectors`` end to end as float32.

    A vector is a tensor's name and length, the name None for zeros.
    """

    name: str
    offset: int
    nbytes: int
    sources: tuple[Source, ...] = ()
    vectors: tuple[tuple[str | None, int], ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return sum(source.rows for source in self.sources)

    @property
    def cols(self) -> int:
        """Columns of the matrix."""
        return self.sources[0].cols

    @property
    def groups(self) -> int:
        """Scales for each row of a quantized matrix."""
        spec = self.sources[0].spec
        return spec.groups(self.cols) if spec else 0


@dataclass
class Layout:
    """``projections`` names, for each product of the decoder, the blocks of its matrices and of their biases."""

    spec: DecoderSpec
    blocks: dict[str, Block] = field(default_factory=dict)
    projections: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)
    nbytes: int = 0

    @property
    def workspace(self) -> int:
        """The most bytes that reading one block takes beside the arena."""
        return max((_workspace(block) for block in self.blocks.values()), default=0)

    @property
    def bits(self) -> tuple[int, ...]:
        """The widths that weights of the layers have, in ascending order."""
        blocks = [block for name, block in self.blocks.items() if name.startswith("layers.")]
        stored = {"float32": 32, "float16": 16, "bfloat16": 16}
        sources = [source for block in blocks for source in block.sources]
        return tuple(sorted({each.spec.num_bits if each.spec else stored[each.dtype] for each in sources}))

    def add(self, name: str, nbytes: int, **parts: object) -> None:
        """Append a block."""
        self.blocks[name] = Block(name, self.nbytes, nbytes, **parts)  # type: ignore[arg-type]
        self.nbytes += aligned(nbytes)

    def describe(self) -> list[list[object]]:
        """Plain data that is equal for equal layouts."""
        return [
            [b.name, b.offset, b.nbytes, [[s.module, s.rows, s.cols, *s.kind] for s in b.sources], list(b.vectors)]
            for b in self.blocks.values()
        ]


@dataclass(frozen=True)
class WeightOptions:
    """How weights are changed while they are read: ``quantize`` a dense model, ``head_bits`` the head by itself."""

    quantize: QuantSpec | None = None
    head_bits: int | None = None

    def __post_init__(self) -> None:
        if self.head_bits not in (None, 4, 8):
            raise InputError(f"load: lm_head_bits {self.head_bits!r} is not supported; use 8, 4 or None.")


def plan_layout(folder: ModelFolder, spec: DecoderSpec, options: WeightOptions) -> Layout:
    """The layout of a folder's weights for the kernels of this CPU.

    Raises CheckpointError where tensors are missing or do not fit config.json, InputError for options that do not fit
    the model, UnsupportedError for tensors of kinds that the engine does not read.
    """
    planner = _Planner(folder, spec, options)
    planner.plan()
    planner.check_rest()
    return planner.layout


class _Planner:
    def __init__(self, folder: ModelFolder, spec: DecoderSpec, options: WeightOptions) -> None:
        self.folder, self.spec, self.options = folder, spec, options
        self.packed = packed_modules(folder)
        self.layout = Layout(spec)
        self.used: set[str] = set()
        if self.packed and options.quantize:
            raise InputError(f"{folder.path}: is quantized already, so bits cannot be chosen; leave them out.")
        if EMBEDDING in self.packed:
            raise UnsupportedError(
                f"{folder.path}: {EMBEDDING} is quantized; the engine does not run that. Use qtale.load_torch for it."
            )

    def plan(self) -> None:
        spec = self.spec
        self._matrices("embedding", [self._source(EMBEDDING, spec.vocab_size, spec.hidden_size, None)])
        self._vector("final_norm", f"{FINAL_NORM}.weight", spec.hidden_size)
        self._head()
        for index in range(spec.num_layers):
            self._layer(index)

    def _head(self) -> None:
        rows, cols, bits = self.spec.vocab_size, self.spec.hidden_size, self.options.head_bits
        quantized = None if bits is None else QuantSpec(bits).resolve(HEAD, cols)
        if HEAD in self.packed and quantized:
            raise InputError(f"{self.folder.path}: its lm_head is quantized already; leave lm_head_bits out.")
        tied = self.spec.tied and HEAD not in self.packed
        if tied and quantized is None:
            self.layout.projections["head"] = [("embedding", None)]
            return
        self._project("head", [(self._source(EMBEDDING if tied else HEAD, rows, cols, quantized), False)])

    def _layer(self, index: int) -> None:
        spec, at, to = self.spec, f"model.layers.{index}", f"layers.{index}"
        self._vector(f"{to}.input_norm", f"{at}.input_layernorm.weight", spec.hidden_size)
        self._vector(f"{to}.post_norm", f"{at}.post_attention_layernorm.weight", spec.hidden_size)
        if spec.qk_norm:
            for name in ("q_norm", "k_norm"):
                self._vector(f"{to}.{name}", f"{at}.self_attn.{name}.weight", spec.head_dim)
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
        chosen = self.options.quantize
        return self._source(module, rows, cols, chosen.resolve(module, cols) if chosen else None)

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
        spec = packed.spec if packed else quantize
        return Source(module, rows, cols, CORE_NAMES[dtype], spec, packed, nbytes)

    def _tensor(self, name: str) -> TensorInfo:
        self.used.add(name)
        info = self.folder.shard_of(name).tensors[name]
        if info.dtype not in CORE_NAMES:
            raise UnsupportedError(
                f"{self.folder.path}: {name} has dtype {info.dtype}; the engine reads {', '.join(CORE_NAMES)}."
            )
        return info

    def _vector(self, block: str, name: str, size: int) -> None:
        self._check_vector(name, size)
        self.layout.add(block, 4 * size, vectors=((name, size),))

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
            self._matrices(block, [source for source, _ in members])
            bias = f"{block}.bias" if any(biased for _, biased in members) else None
            if bias:
                self._bias(bias, members)
            self.layout.projections[name].append((block, bias))

    def _bias(self, block: str, members: Iterable[tuple[Source, bool]]) -> None:
        vectors = tuple((f"{s.module}.bias" if biased else None, s.rows) for s, biased in members)
        for name, size in vectors:
            if name is not None:
                self._check_vector(name, size)
        self.layout.add(block, 4 * sum(size for _, size in vectors), vectors=vectors)

    def _matrices(self, block: str, sources: Sequence[Source]) -> None:
        first, rows = sources[0], sum(source.rows for source in sources)
        if first.spec is None:
            nbytes = sum(source.nbytes for source in sources)
        else:
            groups = first.spec.groups(first.cols)
            nbytes = _core.prepacked_bytes(
                rows, first.cols, groups, first.spec.num_bits, first.spec.symmetric, first.dtype
            )
        self.layout.add(block, nbytes, sources=tuple(sources))

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


def _workspace(block: Block) -> int:
    if not block.sources or block.sources[0].spec is None:
        return 0
    largest = max(source.nbytes for source in block.sources)
    return block.rows * (block.cols + 5 * block.groups) + largest
