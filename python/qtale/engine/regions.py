"""Where every weight of a decoder lies in its arena: matrices and vectors as blocks, blocks by region."""

from __future__ import annotations

from dataclasses import dataclass, field

from qtale.engine.arena import PAGE, aligned
from qtale.engine.spec import DecoderSpec
from qtale.format.tensors import PackedModule
from qtale.spec import ResolvedSpec

# The region of all that no choice of bits changes.
FIXED = "fixed"


# Outputs and inputs of the tiles in which the core multiplies bfloat16 numbers. Files of the cache hold such tiles:
# another order of their numbers needs another version there.
TILE = (16, 32)
_CONVERTED_BYTES = 16 << 20


def dense_shape(rows: int, cols: int, tiled: bool) -> tuple[int, ...]:
    """The shape of a matrix that is not quantized, as the core takes it."""
    return (rows // TILE[0], cols // TILE[1], *TILE) if tiled else (rows, cols)


@dataclass(frozen=True)
class Source:
    """A matrix on disk: ``spec`` says how it is, or is to be, quantized; ``dtype`` is of its scales, or its own.

    ``nbytes`` are those of its tensors. Without a spec ``stored`` is their dtype, and ``dtype`` what it is kept in,
    ``tiled`` in tiles that the core multiplies.
    """

    module: str
    rows: int
    cols: int
    dtype: str
    spec: ResolvedSpec | None
    packed: PackedModule | None
    nbytes: int
    stored: str
    tiled: bool = False

    @property
    def is_stored(self) -> bool:
        """Whether memory holds the bytes that the disk does."""
        return self.spec is None and self.dtype == self.stored and not self.tiled

    @property
    def dense_nbytes(self) -> int:
        """Bytes in memory without a spec."""
        return self.nbytes if self.is_stored else self.rows * self.cols * 2

    @property
    def converted_rows(self) -> int:
        """Rows that are read at once where memory does not hold what the disk does: whole tiles."""
        tiles = _CONVERTED_BYTES * self.rows // self.nbytes // TILE[0]
        return min(self.rows, max(1, tiles) * TILE[0])

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for matrices that can be one, their rows side by side."""
        if self.spec is None:
            return (self.dtype, "tiles") if self.tiled else (self.dtype,)
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
    def dense_shape(self) -> tuple[int, ...]:
        """Of a matrix without a spec, as the core takes it."""
        return dense_shape(self.rows, self.cols, self.sources[0].tiled)

    @property
    def groups(self) -> int:
        """Scales for each row of a quantized matrix."""
        spec = self.sources[0].spec
        return spec.groups(self.cols) if spec else 0


@dataclass
class Region:
    """Whole pages with some of the blocks: those of a projection, or all that no choice of bits changes."""

    offset: int
    nbytes: int = 0
    blocks: list[str] = field(default_factory=list)


@dataclass
class Layout:
    """``projections`` names, for each product of the decoder, the blocks of its matrices and of their biases.

    ``regions`` tile the arena; those of projections have their names.
    """

    spec: DecoderSpec
    blocks: dict[str, Block] = field(default_factory=dict)
    projections: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all regions."""
        return sum(region.nbytes for region in self.regions.values())

    @property
    def workspace(self) -> int:
        """The most bytes that reading one block takes beside the arena."""
        return max((_workspace(block) for block in self.blocks.values()), default=0)

    @property
    def bits(self) -> tuple[int, ...]:
        """The widths that weights of the layers have, in ascending order."""
        sources = [source for name in self.regions if name.startswith("layers.") for source in self.sources(name)]
        stored = {"float32": 32, "float16": 16, "bfloat16": 16}
        return tuple(sorted({each.spec.num_bits if each.spec else stored[each.dtype] for each in sources}))

    def add(self, where: str, name: str, nbytes: int, **parts: object) -> None:
        """Append a block to a region, which begins where the one before ends."""
        if where not in self.regions:
            before = next(reversed(self.regions.values()), None)
            self.regions[where] = Region(0 if before is None else before.offset + before.nbytes)
        region = self.regions[where]
        last = self.blocks[region.blocks[-1]] if region.blocks else None
        offset = region.offset if last is None else last.offset + aligned(last.nbytes)
        self.blocks[name] = Block(name, offset, nbytes, **parts)  # type: ignore[arg-type]
        region.blocks.append(name)
        region.nbytes = aligned(offset + nbytes - region.offset, PAGE)

    def sources(self, region: str) -> list[Source]:
        """The matrices of a region, in order."""
        return [source for name in self.regions[region].blocks for source in self.blocks[name].sources]

    def take(self, region: str, other: Layout) -> None:
        """Let a region be what it is in another layout of the same model."""
        for name in self.regions[region].blocks:
            del self.blocks[name]
        self.regions[region] = other.regions[region]
        self.projections[region] = other.projections[region]
        self.blocks |= {name: other.blocks[name] for name in other.regions[region].blocks}

    def describe(self) -> list[list[object]]:
        """Plain data that is equal for equal layouts."""
        return [
            [b.name, b.offset, b.nbytes, [[s.module, s.rows, s.cols, *s.kind] for s in b.sources], list(b.vectors)]
            for b in self.blocks.values()
        ]


def _workspace(block: Block) -> int:
    if not block.sources:
        return 0
    if block.sources[0].spec is None:
        return max(0 if s.is_stored else s.converted_rows * (s.nbytes // s.rows) for s in block.sources)
    largest = max(source.nbytes for source in block.sources)
    return block.rows * (block.cols + 5 * block.groups) + largest
