"""What a calibrated quantization will take, from the headers of the model: arithmetic, time and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qtale import _core, names
from qtale.checkpoint.folder import ModelFolder
from qtale.ptq.options import SolverOptions
from qtale.ptq.recipe import recipe_of
from qtale.ptq.streams import BATCH_TOKENS
from qtale.ptq.tune import TuneOptions, needed_bytes
from qtale.ptq.worklist import PROCESS_BYTES, LayerRow

# transformers and lm-eval's part of the process, beside torch and qtale.
_LIBRARIES = 192 << 20
# A dense run, one of the student, and two products of its backward pass.
_TUNING_RUNS = 4
# Share of the float32 peak that the whole of it reaches, measured with benchmarks/ptq.py.
_SHARE = 0.5


@dataclass(frozen=True)
class Estimate:
    """``operations`` in floating point, ``seconds`` that they take here and now, and the most resident memory."""

    operations: int
    seconds: float
    peak_bytes: int


def estimate(folder: ModelFolder, rows: Mapping[str, LayerRow], options: SolverOptions, max_memory: int) -> Estimate:
    """Of :func:`qtale.ptq.solve_layers`; the speed of this machine is measured for a tenth of a second."""
    operations = _operations(folder, rows.values(), options)
    peak = _core.measure_peak("f32_fma", 0.1) or 1e10
    return Estimate(
        operations, operations / (_SHARE * peak * _core.num_threads()), _peak(folder, rows, options, max_memory)
    )


def _operations(folder: ModelFolder, rows: Iterable[LayerRow], options: SolverOptions) -> int:
    tokens, total, seen = options.num_samples * options.seq_len, 0, set()
    inner = int(folder.config.get("intermediate_size", 0))
    for row in rows:
        out, width = row.shape
        recipe = recipe_of(options, row.spec)
        # What lies between the attention and the last matrix runs for that one, and again for the next layer.
        runs = 2 if out in (inner, 2 * inner) else 1
        total += 2 * tokens * out * width * (runs + (2 if recipe.awq else 0))
        stage = names.shared_spec_key(row.name) or row.name
        if stage not in seen:
            seen.add(stage)
            total += tokens * width**2 + 2 * width**3
        sweeps = recipe.gptq / 2 + 2 * recipe.rounds + (recipe.magr_iterations if recipe.magr_alpha else 0)
        total += int(2 * out * width**2 * sweeps)
    parameters = sum(info.numel for info in folder.tensors.values())
    tuned = options.tuning * TuneOptions(1, 0).sequences * options.seq_len
    return total + 2 * tuned * parameters * _TUNING_RUNS


def _peak(folder: ModelFolder, rows: Mapping[str, LayerRow], options: SolverOptions, max_memory: int) -> int:
    config = folder.config
    hidden, inner = int(config.get("hidden_size", 0)), int(config.get("intermediate_size", 0))
    layers: dict[int | None, int] = {}
    for row in rows.values():
        index = names.block_index(f"{row.name}.")
        layers[index] = layers.get(index, 0) + row.shape[0] * row.shape[1]
    width = max(row.shape[1] for row in rows.values())
    streams = 5 if "awq" in options.method else 3
    states = streams * options.num_samples * options.seq_len * hidden * 4
    if states > max_memory:
        states = 0  # they lie in files
    # As a head takes that is rounded at the end.
    largest = max((info.nbytes for info in folder.tensors.values()), default=0)
    # A layer twice, dense and quantized; the Hessian, its damped copy, factor and inverse, two of them in float64.
    solving = 8 * max(layers.values()) + 24 * width**2 + 4 * BATCH_TOKENS * (4 * inner + 6 * hidden)
    tuning = needed_bytes(folder, options.seq_len, TuneOptions(options.tuning, 0)) if options.tuning else 0
    return PROCESS_BYTES + _LIBRARIES + max(largest, solving + states, tuning)
