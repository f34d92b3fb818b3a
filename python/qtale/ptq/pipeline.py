"""``qtale.quantize``: a dense model folder in, a compressed-tensors folder out, streamed tensor by tensor."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale import names
from qtale.checkpoint.folder import CONFIG_FILE, ModelFolder, open_folder
from qtale.checkpoint.index import INDEX_FILE, read_json_object
from qtale.checkpoint.output import check_output, output_folder, write_json
from qtale.checkpoint.safetensors import Shard, TensorInfo
from qtale.checkpoint.writer import ShardWriter, TensorShape
from qtale.errors import CheckpointError, InputError
from qtale.format.config import build_config
from qtale.format.tensors import packed_layout, packed_tensors
from qtale.layerwise.states import MAX_MEMORY
from qtale.ptq.calibrated import solve_layers
from qtale.ptq.estimate import estimate
from qtale.ptq.options import SolverOptions
from qtale.ptq.solved import SolvedTensors
from qtale.ptq.worklist import LayerRow, Overrides, QuantizeReport, Worklist, build_report, list_work, planned_overrides
from qtale.spec import QuantSpec

if TYPE_CHECKING:
    from qtale.planner.plan import Plan

_logger = logging.getLogger("qtale")
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*")
_WRITTEN = {CONFIG_FILE, INDEX_FILE}
# Room for headers, tokenizer and configuration beside the tensor data.
_MARGIN_BYTES = 32 << 20


def quantize(
    model: str | Path,
    out: str | Path | None,
    spec: QuantSpec | None = None,
    *,
    plan: Plan | str | Path | None = None,
    overrides: Overrides | None = None,
    options: SolverOptions | None = None,
    tokens: Any = None,
    resume: str | Path | None = None,
    max_memory: int = MAX_MEMORY,
    dry_run: bool = False,
    progress: bool = True,
) -> QuantizeReport:
    """Quantize the Linear layers of a model's decoder blocks and write a new HF folder.

    ``model`` is a folder or a hub name, ``out`` a folder that does not exist yet (None in a dry run), ``spec`` what
    every layer gets (default 4 bits, symmetric, automatic groups). ``plan`` (a plan or its file) gives each layer bits
    of its own instead. ``overrides`` maps exact module names to specs of their own, None leaving a layer dense.
    ``options`` names the method, by default rounding to nearest; all others are calibrated with ``tokens``, token
    numbers [sequences, length], and take ``resume`` and ``max_memory`` as :func:`qtale.ptq.solve_layers` does. A head
    is always rounded to nearest. A dry run reads headers only and writes nothing. Peak memory is about the largest
    matrix when rounding, else one layer in float32; each input shard becomes one output shard of the same name, and
    ``out`` appears at the end, whole.

    Raises InputError (output exists, group size does not divide, bad overrides, a plan for another model, a plan beside
    a spec or overrides), CheckpointError (broken files, NaN or
    infinite weights), UnsupportedError (quantized already, unknown architecture), Error (disk full).
    """
    if out is not None:
        check_output(Path(out).expanduser())
    elif not dry_run:
        raise InputError("quantize: no output folder is given; give one, or ask for a dry run.")
    if plan is not None and (spec is not None or overrides is not None):
        raise InputError("quantize: a plan says what every layer gets; give it without a spec and without overrides.")
    folder = open_folder(model)
    if plan is not None:
        overrides = planned_overrides(folder, _read_plan(plan))
    work = list_work(folder, spec or QuantSpec(), overrides or {})
    report = build_report(folder, work, None if out is None else str(out), dry_run)
    if work.left_dense:
        _logger.warning("left dense, not known as Linear layers: %s", _shortened(work.left_dense))
    calibrated = options is not None and options.calibrated
    if options is not None and calibrated and dry_run:
        expected = estimate(folder, _blocks(work), options, max_memory)
        return dataclasses.replace(report, peak_bytes=expected.peak_bytes, estimated_seconds=expected.seconds)
    if dry_run or out is None:
        return report
    with ExitStack() as stack:
        solved = None
        if options is not None and calibrated:
            settings: dict[str, Any] = {"resume": resume, "max_memory": max_memory, "progress": progress}
            found = stack.enter_context(solve_layers(folder, _blocks(work), options, tokens, **settings))
            solved = Solution(stack.enter_context(found.layers.reading(found.files)), found.found)
        target = stack.enter_context(output_folder(out, report.bytes_after + _MARGIN_BYTES))
        rows = _write_shards(folder, work, target, progress, solved)
        _write_small_files(folder, work, target)
    return dataclasses.replace(report, layers=rows)


def _blocks(work: Worklist) -> dict[str, LayerRow]:
    return {name: row for name, row in work.rows.items() if names.block_index(f"{name}.") is not None}


@dataclasses.dataclass(frozen=True)
class Solution:
    """What a calibrated method found: tensors as they are to be stored, and what is known of every matrix."""

    tensors: SolvedTensors
    found: Mapping[str, Mapping[str, float]]


def _read_plan(plan: Plan | str | Path) -> Plan:
    from qtale.planner.plan import Plan

    return plan if isinstance(plan, Plan) else Plan.read(plan)


def _write_shards(
    folder: ModelFolder, work: Worklist, target: Path, progress: bool, solved: Solution | None
) -> tuple[LayerRow, ...]:
    from tqdm.auto import tqdm

    rows: list[LayerRow] = []
    with tqdm(total=folder.nbytes, unit="B", unit_scale=True, desc="quantize", disable=not progress) as bar:
        for shard in folder.shards:
            metadata = {"format": "pt", **shard.metadata}
            with ShardWriter(target / shard.path.name, _output_tensors(shard, work), metadata) as writer:
                for info in shard.tensors.values():
                    row = work.rows.get(_quantized_module(info, work))
                    if row is None and solved is not None and info.name in solved.tensors:
                        writer.write(info.name, solved.tensors[info.name])
                    elif row is None:
                        writer.copy(shard, info)
                    elif solved is not None and row.name in solved.found:
                        rows.append(_copy_layer(folder, row, writer, solved))
                    else:
                        rows.append(_quantize_layer(folder, shard, row, writer))
                        bar.set_postfix_str(f"{row.name} error {rows[-1].error:.4f}")
                    bar.update(info.nbytes)
    return tuple(sorted(rows, key=lambda row: names.model_order(row.name)))


def _quantize_layer(folder: ModelFolder, shard: Shard, row: LayerRow, writer: ShardWriter) -> LayerRow:
    from qtale.ptq.rtn import relative_error, round_to_nearest

    weight = folder.torch(f"{row.name}.weight")
    try:
        quantized = round_to_nearest(weight, row.spec)
    except InputError as error:
        raise CheckpointError(f"{shard.path}: {row.name}.weight cannot be quantized: {error}") from error
    for name, tensor in packed_tensors(row.name, *quantized, row.num_bits).items():
        writer.write(name, tensor)
    return dataclasses.replace(row, error=relative_error(weight, quantized))


def _copy_layer(folder: ModelFolder, row: LayerRow, writer: ShardWriter, solved: Solution) -> LayerRow:
    for tensor in packed_layout(row.name, row.shape, row.spec, row.dtype).values():
        writer.write(tensor.name, solved.tensors[tensor.name])
    known: dict[str, Any] = dict(solved.found[row.name])
    return dataclasses.replace(row, **known)


def _quantized_module(info: TensorInfo, work: Worklist) -> str:
    """The module that ``info`` is the weight of where that one is quantized, else an empty name."""
    module, _, kind = info.name.rpartition(".")
    return module if kind == "weight" and module in work.rows else ""


def _output_tensors(shard: Shard, work: Worklist) -> Iterator[TensorShape]:
    for info in shard.tensors.values():
        row = work.rows.get(_quantized_module(info, work))
        if row is None:
            yield TensorShape(info.name, info.dtype, info.shape)
        else:
            yield from packed_layout(row.name, row.shape, row.spec, row.dtype).values()


def _write_small_files(folder: ModelFolder, work: Worklist, target: Path) -> None:
    for pattern in _COPIED:
        for source in sorted(folder.path.glob(pattern)):
            if source.is_file() and source.name not in _WRITTEN:
                shutil.copyfile(source, target / source.name)
    if folder.sharded:
        write_json(target / INDEX_FILE, _new_index(folder, work))
    specs = {module: row.spec for module, row in work.rows.items()}
    write_json(target / CONFIG_FILE, {**folder.config, "quantization_config": build_config(specs, work.ignore)})


def _new_index(folder: ModelFolder, work: Worklist) -> Mapping[str, Any]:
    weight_map: dict[str, str] = {}
    total = 0
    for shard in folder.shards:
        for tensor in _output_tensors(shard, work):
            weight_map[tensor.name] = shard.path.name
            total += tensor.nbytes
    metadata = read_json_object(folder.path / INDEX_FILE).get("metadata")
    kept = metadata if isinstance(metadata, dict) else {}
    return {"metadata": {**kept, "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _shortened(modules: tuple[str, ...]) -> str:
    shown = ", ".join(modules[:3])
    return shown if len(modules) <= 3 else f"{shown} and {len(modules) - 3} more"
