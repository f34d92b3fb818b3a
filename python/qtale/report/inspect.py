"""``qtale.inspect``: what is in a model folder, from its headers alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtale import names
from qtale.checkpoint.folder import ModelFolder, open_folder
from qtale.checkpoint.safetensors import STORED_FLOATS, TensorInfo
from qtale.format.tensors import PackedModule, packed_modules
from qtale.report.text import Row, describe_groups, fold, human_bytes, table

_PACKED_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_DTYPE_NAMES = {"F64": "float64", **STORED_FLOATS}


@dataclass(frozen=True)
class InspectRow:
    """One tensor, or one quantized module with all of its tensors.

    ``shape`` is the logical one, ``num_bits`` those of one element; ``group_size`` (0 = per channel) and ``symmetric``
    are None for dense tensors.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    num_bits: int
    group_size: int | None
    symmetric: bool | None
    parameters: int
    bytes: int

    @property
    def quantized(self) -> bool:
        """Whether the row is a quantized module."""
        return self.group_size is not None


@dataclass(frozen=True)
class InspectReport:
    """What a model folder holds; ``str()`` gives a compact table, ``text(every_layer=True)`` the whole one."""

    path: str
    model_type: str
    architectures: tuple[str, ...]
    dtype: str
    tied_embeddings: bool
    shards: int
    blocks: int
    layers: tuple[InspectRow, ...]

    @property
    def parameters(self) -> int:
        """Number of logical weights."""
        return sum(row.parameters for row in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(row.bytes for row in self.layers)

    @property
    def bytes_quantized(self) -> int:
        """Bytes of the quantized modules."""
        return sum(row.bytes for row in self.layers if row.quantized)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits on disk for each weight of the model; None for an empty one."""
        return 8 * self.bytes / self.parameters if self.parameters else None

    @property
    def bits_per_weight_quantized(self) -> float | None:
        """Bits on disk for each weight of the quantized modules; None for a dense model."""
        weights = sum(row.parameters for row in self.layers if row.quantized)
        return 8 * self.bytes_quantized / weights if weights else None

    def to_json(self) -> dict[str, Any]:
        """A JSON object of all fields and totals."""
        value = dataclasses.asdict(self)
        for key in ("parameters", "bytes", "bytes_quantized", "bits_per_weight", "bits_per_weight_quantized"):
            value[key] = getattr(self, key)
        return value

    def text(self, every_layer: bool = False) -> str:
        """A table of the layers, equal ones folded unless ``every_layer``, and the totals."""
        rows = [_text_row(row) for row in self.layers]
        lines = [
            (row.name, str(row.count), *row.cells, human_bytes(row.sizes[0]))
            for row in (rows if every_layer else fold(rows))
        ]
        header = ("layer", "count", "shape", "bits", "group", "zero", "size")
        return "\n".join([self._headline(), "", table(header, lines), "", self._totals()])

    def __str__(self) -> str:
        return self.text()

    def _headline(self) -> str:
        architecture = ", ".join(self.architectures) or self.model_type
        tied = "tied" if self.tied_embeddings else "not tied"
        return f"{self.path}: {architecture}, {self.blocks} blocks, {self.dtype}, embedding and head {tied}"

    def _totals(self) -> str:
        shards = "1 file" if self.shards == 1 else f"{self.shards} files"
        text = f"{self.parameters:,} parameters in {human_bytes(self.bytes)} ({shards})"
        if self.bits_per_weight is not None:
            text += f", {self.bits_per_weight:.2f} bits per weight"
        if self.bits_per_weight_quantized is not None:
            text += (
                f"; {human_bytes(self.bytes_quantized)} of it quantized, "
                f"{self.bits_per_weight_quantized:.2f} bits per weight there"
            )
        return text


def inspect(path: str | Path) -> InspectReport:
    """Describe a model folder (or hub name), dense or quantized, from its headers alone; torch is not needed.

    Raises CheckpointError for missing, broken or hostile files and UnsupportedError for formats that qtale does not
    read.
    """
    folder = open_folder(path)
    packed = packed_modules(folder)
    rows: list[InspectRow] = []
    for info in folder.tensors.values():
        module, _, part = info.name.rpartition(".")
        if module in packed and part in _PACKED_PARTS:
            if part == _PACKED_PARTS[0]:
                rows.append(_packed_row(packed[module]))
        else:
            rows.append(_dense_row(info))
    rows.sort(key=lambda row: names.model_order(row.name))
    blocks = {names.block_index(row.name) for row in rows} - {None}
    return InspectReport(
        path=str(folder.path),
        model_type=str(folder.config.get("model_type", "unknown")),
        architectures=_architectures(folder),
        dtype=_main_dtype(rows),
        tied_embeddings=_is_tied(folder, rows),
        shards=len(folder.shards),
        blocks=len(blocks),
        layers=tuple(rows),
    )


def _packed_row(module: PackedModule) -> InspectRow:
    return InspectRow(
        name=module.name,
        role=names.LINEAR,
        shape=(module.out_features, module.in_features),
        dtype=module.dtype,
        num_bits=module.spec.num_bits,
        group_size=module.spec.group_size,
        symmetric=module.spec.symmetric,
        parameters=module.out_features * module.in_features,
        bytes=module.nbytes,
    )


def _dense_row(info: TensorInfo) -> InspectRow:
    bits = 8 * info.nbytes // info.numel if info.numel else 0
    role = names.role(info.name, info.shape)
    return InspectRow(info.name, role, info.shape, info.dtype, bits, None, None, info.numel, info.nbytes)


def _text_row(row: InspectRow) -> Row:
    shape = " x ".join(map(str, row.shape)) or "scalar"
    if row.group_size is None:
        return Row(row.name, (shape, row.dtype, "", ""), (row.bytes,))
    zero = "" if row.symmetric else "yes"
    return Row(row.name, (shape, str(row.num_bits), describe_groups(row.group_size), zero), (row.bytes,))


def _architectures(folder: ModelFolder) -> tuple[str, ...]:
    found = folder.config.get("architectures")
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _main_dtype(rows: list[InspectRow]) -> str:
    weights: Counter[str] = Counter()
    for row in rows:
        weights[row.dtype] += row.parameters
    most = weights.most_common(1)
    return _DTYPE_NAMES.get(most[0][0], most[0][0]) if most else "unknown"


def _is_tied(folder: ModelFolder, rows: list[InspectRow]) -> bool:
    if any(row.role == names.HEAD for row in rows):
        return folder.config.get("tie_word_embeddings") is True
    return any(row.role == names.EMBEDDING for row in rows) and "CausalLM" in "".join(_architectures(folder))
