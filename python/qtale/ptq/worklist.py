"""What a quantization will do, from the headers of the model alone: no tensor is read and torch is not needed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtale import names
from qtale.checkpoint.folder import ModelFolder
from qtale.checkpoint.identity import fingerprint
from qtale.checkpoint.safetensors import TensorInfo
from qtale.errors import InputError, UnsupportedError
from qtale.format.config import parse_config
from qtale.format.tensors import SCALE_DTYPES, packed_layout
from qtale.spec import QuantSpec, ResolvedSpec

if TYPE_CHECKING:
    from qtale.planner.plan import Plan

HEAD = "lm_head"
REPORT_FORMAT, REPORT_VERSION = "qtale.quantization", 1
# Resident size of Python with torch and qtale loaded, which comes on top of what the weights take.
PROCESS_BYTES = 320 << 20
# Rows are compared with the original in pieces of this many weights, in float32.
ERROR_CHUNK = 1 << 20

Overrides = Mapping[str, QuantSpec | None]


@dataclass(frozen=True)
class LayerRow:
    """One quantized matrix: ``shape`` is [out, in], ``group_size`` 0 means one scale per output row.

    ``error`` is |ŵ - w| / |w| (Frobenius norms), None in a dry run and for calibrated methods, which have instead:
    ``output_error``, the mean of |(ŵ - w) x|² over that of |w x|² for the calibration inputs x, beside
    ``rtn_output_error``, that of rounding to nearest, and the ``seconds`` that solving took.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    num_bits: int
    group_size: int
    symmetric: bool
    bytes_before: int
    bytes_after: int
    error: float | None = None
    output_error: float | None = None
    rtn_output_error: float | None = None
    seconds: float | None = None

    @property
    def spec(self) -> ResolvedSpec:
        """The spec that the layer is written with."""
        return ResolvedSpec(self.num_bits, self.group_size, self.symmetric)

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight, scales and zero points included."""
        return 8 * self.bytes_after / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class QuantizeReport:
    """What ``quantize`` did, or in a dry run would do; sizes in bytes of tensor data.

    ``left_dense`` names matrices inside decoder blocks that are copied as they are, ``peak_bytes`` estimates the
    resident memory of the run and ``estimated_seconds``, of a calibrated dry run alone, its time on this machine.
    """

    model: str
    out: str | None
    dry_run: bool
    layers: tuple[LayerRow, ...]
    left_dense: tuple[str, ...]
    parameters: int
    bytes_before: int
    bytes_after: int
    peak_bytes: int
    estimated_seconds: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each parameter of the whole model."""
        return 8 * self.bytes_after / self.parameters

    @property
    def bits_per_weight_quantized(self) -> float:
        """Bits on disk for each weight of the quantized layers alone."""
        weights = sum(row.shape[0] * row.shape[1] for row in self.layers)
        return 8 * sum(row.bytes_after for row in self.layers) / weights

    def to_json(self) -> dict[str, Any]:
        """A JSON object of all fields, with both bits per weight; ``qtale report`` reads it."""
        value = {"format": REPORT_FORMAT, "version": REPORT_VERSION, **dataclasses.asdict(self)}
        value["bits_per_weight"] = self.bits_per_weight
        value["bits_per_weight_quantized"] = self.bits_per_weight_quantized
        return value

    def __str__(self) -> str:
        verb = "would quantize" if self.dry_run else "quantized"
        return (
            f"{verb} {len(self.layers)} layers of {self.model}: {self.bytes_before:,} → {self.bytes_after:,} bytes, "
            f"{self.bits_per_weight:.2f} bits per weight ({self.bits_per_weight_quantized:.2f} in the quantized layers)"
        )


@dataclass(frozen=True)
class Worklist:
    """Rows by module name, and the modules that the ``ignore`` list must name."""

    rows: Mapping[str, LayerRow]
    ignore: tuple[str, ...]
    left_dense: tuple[str, ...]


def list_work(folder: ModelFolder, spec: QuantSpec, overrides: Overrides) -> Worklist:
    """Decide what becomes of every matrix of a dense folder.

    Raises InputError for a group size that does not divide, an override that names no layer, or q/k/v and gate/up with
    different specs; UnsupportedError for folders that are quantized already or hold nothing that qtale can quantize.
    """
    _check_source(folder)
    linears = {
        names.module_of(info.name): info
        for info in sorted(folder.tensors.values(), key=lambda info: names.model_order(info.name))
        if names.role(info.name, info.shape) == names.LINEAR
    }
    if not linears:
        raise UnsupportedError(
            f"{folder.path}: has no Linear weights in numbered decoder blocks that qtale knows by name "
            f"(model_type {folder.config.get('model_type')!r}); the Llama family is what it is made for."
        )
    if overrides.get(HEAD) is not None:
        linears[HEAD] = _head(folder)
    _check_overrides(overrides, linears)
    rows: dict[str, LayerRow] = {}
    for module, info in linears.items():
        asked = overrides.get(module, spec)
        if asked is not None:
            rows[module] = _row(folder, module, info, asked)
    if not rows:
        raise InputError(f"{folder.path}: every layer is to stay as it is stored; there is nothing to quantize.")
    _check_shared(rows, linears)
    dense = _dense_matrices(folder, rows)
    left_dense = tuple(module for module in dense if names.block_index(f"{module}.") is not None)
    head = [] if HEAD in dense or HEAD in rows else [HEAD]
    return Worklist(rows, (*head, *dense), left_dense)


def planned_overrides(folder: ModelFolder, plan: Plan) -> Overrides:
    """The spec of every Linear under a plan, None where it stays as stored.

    Raises InputError where the plan is for another model or does not cover its Linears exactly.
    """
    linears = [
        names.module_of(info.name)
        for info in folder.tensors.values()
        if names.role(info.name, info.shape) == names.LINEAR
    ]
    plan.check_model(fingerprint(folder), linears)
    head = plan.spec_of(HEAD)
    return {**{module: plan.spec_of(module) for module in linears}, **({HEAD: head} if head is not None else {})}


def _head(folder: ModelFolder) -> TensorInfo:
    info = folder.tensors.get(f"{HEAD}.weight")
    if info is None or folder.config.get("tie_word_embeddings") is True:
        raise UnsupportedError(
            f"{folder.path}: its head is the embedding and cannot be quantized alone; leave lm_head at 16 bits."
        )
    return info


def build_report(folder: ModelFolder, work: Worklist, out: str | None, dry_run: bool) -> QuantizeReport:
    """The report of a worklist; sizes are exact because the layout is known."""
    rows = tuple(work.rows.values())
    before = folder.nbytes
    after = before + sum(row.bytes_after - row.bytes_before for row in rows)
    parameters = sum(info.numel for info in folder.tensors.values())
    return QuantizeReport(
        str(folder.path), out, dry_run, rows, work.left_dense, parameters, before, after, _peak_bytes(rows)
    )


def _peak_bytes(rows: tuple[LayerRow, ...]) -> int:
    # The matrix, its int8 codes and its packed form live together; the comparison holds three float32 pieces.
    layer = max(row.bytes_before + row.shape[0] * row.shape[1] + row.bytes_after for row in rows)
    return PROCESS_BYTES + layer + 3 * 4 * ERROR_CHUNK


def _check_source(folder: ModelFolder) -> None:
    if folder.config.get("quantization_config") is not None:
        parse_config(folder.config, str(folder.path))
        raise UnsupportedError(f"{folder.path}: is quantized already; start from the dense model.")
    if folder.config.get("model_type") in names.TRANSPOSED_MODEL_TYPES:
        raise UnsupportedError(
            f"{folder.path}: model_type {folder.config['model_type']!r} stores its matrices transposed (Conv1D), which "
            "pack-quantized cannot express; use a model whose layers are nn.Linear, as the Llama family's."
        )


def _check_overrides(overrides: Overrides, linears: Mapping[str, TensorInfo]) -> None:
    for module in overrides:
        if module not in linears:
            near = difflib.get_close_matches(module, linears, n=3)
            hint = f"; near names: {', '.join(near)}" if near else ""
            raise InputError(f"overrides: {module!r} is no quantizable layer of this model{hint}.")


def _row(folder: ModelFolder, module: str, info: TensorInfo, spec: QuantSpec) -> LayerRow:
    if info.dtype not in SCALE_DTYPES:
        raise UnsupportedError(
            f"{folder.path}: {info.name} has dtype {info.dtype}; quantize takes {', '.join(SCALE_DTYPES)}."
        )
    shape = (info.shape[0], info.shape[1])
    if 0 in shape:
        raise UnsupportedError(f"{folder.path}: {info.name} has the empty shape {list(shape)}.")
    resolved = spec.resolve(module, shape[1])
    after = sum(tensor.nbytes for tensor in packed_layout(module, shape, resolved, info.dtype).values())
    return LayerRow(
        module, shape, info.dtype, resolved.num_bits, resolved.group_size, resolved.symmetric, info.nbytes, after
    )


def _check_shared(rows: Mapping[str, LayerRow], linears: Mapping[str, TensorInfo]) -> None:
    first: dict[str, str] = {}
    for module in linears:
        key = names.shared_spec_key(module)
        if key is None:
            continue
        other = first.setdefault(key, module)
        here, there = (rows[name].spec if name in rows else None for name in (module, other))
        if here != there:
            raise InputError(
                f"overrides: {module} ({_describe(here)}) and {other} ({_describe(there)}) must share one spec, "
                "because engines fuse them into one matrix; give both the same."
            )


def _describe(spec: ResolvedSpec | None) -> str:
    if spec is None:
        return "dense"
    grouping = f"groups of {spec.group_size}" if spec.group_size else "per channel"
    return f"{spec.num_bits} bits, {grouping}, {'symmetric' if spec.symmetric else 'asymmetric'}"


def _dense_matrices(folder: ModelFolder, rows: Mapping[str, LayerRow]) -> list[str]:
    kept = []
    for info in folder.tensors.values():
        module = names.module_of(info.name)
        is_matrix = info.name.endswith(".weight") and len(info.shape) == 2
        if is_matrix and module not in rows and names.role(info.name, info.shape) not in (names.EMBEDDING, names.NORM):
            kept.append(module)
    return kept
