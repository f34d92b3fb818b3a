"""One decoder layer of a calibrated quantization: stage by stage, each with inputs of what is quantized already."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qtale.checkpoint.safetensors import STORED_FLOATS
from qtale.format.tensors import packed_tensors
from qtale.process import release
from qtale.ptq.awq import scale_inputs
from qtale.ptq.matrix import restored, solve_matrix
from qtale.ptq.moments import Moments
from qtale.ptq.options import SolverOptions
from qtale.ptq.products import products, to_sum
from qtale.ptq.recipe import Recipe, recipe_of
from qtale.ptq.silence import begins_behind, part_around, silenced
from qtale.ptq.stages import Stage, find_stages, rows_entering
from qtale.ptq.streams import BEHIND, DENSE, ENTERING, QUANTIZED, Streams
from qtale.ptq.weights import LayerWeights
from qtale.ptq.worklist import LayerRow

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qtale.layerwise.model import Layer, LayeredModel

# Keeps tokens of almost no energy from counting without bounds.
_LEAST_ENERGY = 1e-3


@dataclass
class LayerSolver:
    """Solves layer ``index``, whose function is ``exact``, and holds what will be stored of it in ``tensors``.

    ``rows`` are the matrices to be quantized by module name; ``found`` gets the errors and seconds of each.
    """

    model: LayeredModel
    streams: Streams
    index: int
    exact: Layer
    rows: Mapping[str, LayerRow]
    options: SolverOptions
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    found: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parts: dict[str, nn.Module] = self.model.parts(self.index)
        parameters = self.model.linears(self.index)
        linears = {name: self.parts[name] for name in parameters}
        self.weights = LayerWeights(parameters)
        sample = self.streams.read(QUANTIZED, self.index, 0, 1)
        self._source = QUANTIZED
        self._kept: Stage | None = None
        self.stages = find_stages(self.parts, linears, self.exact, sample)

    def run(self, done: Callable[[int], object]) -> None:
        """Solve every stage and write the streams before the next layer; ``done`` is told sequences as they finish."""
        if any(self._recipe(stage).awq for stage in self.stages if self._solved(stage)):
            self.tensors |= scale_inputs(self)
        with ExitStack() as stack:
            for stage in self.stages:
                part = self._finished_by(stage)
                if part is not None:
                    self._keep(stage)
                if self._solved(stage):
                    self._solve(stage)
                if part is not None:
                    self._go_behind(stage)
                    stack.enter_context(silenced(part))
            self.streams.advance(QUANTIZED, self.index, self.layer, done, self._source)
            self._source = QUANTIZED
        if DENSE in self.streams.kinds:
            with self.weights.using(DENSE):
                self.streams.advance(DENSE, self.index, self.layer, lambda _: None)

    def layer(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer as it runs over the calibration tokens."""
        with products(self.options.compute_dtype):
            return self.exact(hidden)

    def _finished_by(self, stage: Stage) -> nn.Module | None:
        """The part that ends with ``stage`` where all that is left of the layer can begin with the stream behind it."""
        around = part_around(self.parts, stage.modules[0])
        if stage is self.stages[-1] or stage.residual is None or around is None or self._source != QUANTIZED:
            return None
        part, sample = self.parts[around], self.streams.read(QUANTIZED, self.index, 0, 1)
        rows, _ = rows_entering(self.parts, stage, self.exact, sample)
        behind = sample + self.parts[stage.modules[0]](rows).reshape(sample.shape)
        return part if begins_behind(part, self.exact, sample, behind) else None

    def _keep(self, stage: Stage) -> None:
        """Keep what enters a stage that ends a part, so that the part runs but once."""

        def entering(start: int, stop: int) -> torch.Tensor:
            rows, _ = self._rows(QUANTIZED, stage, start, stop)
            return rows.float().reshape(stop - start, -1, rows.shape[-1])

        self.streams.fill(ENTERING, self.index, entering)
        self._kept = stage

    def _go_behind(self, stage: Stage) -> None:
        """Keep the residual stream behind a finished part, so that later stages need not run what comes before it."""

        def behind(start: int, stop: int) -> torch.Tensor:
            before = self.streams.read(QUANTIZED, self.index, start, stop)
            rows = self.streams.read(ENTERING, self.index, start, stop)
            with products(self.options.compute_dtype):
                after: torch.Tensor = before + self.parts[stage.modules[0]](rows)
            return after

        self.streams.fill(BEHIND, self.index, behind)
        self.streams.forget(ENTERING, self.index)
        self._source, self._kept = BEHIND, None

    def _solved(self, stage: Stage) -> list[str]:
        return [name for name in stage.modules if name in self.rows]

    def _recipe(self, stage: Stage) -> Recipe:
        return recipe_of(self.options, self.rows[self._solved(stage)[0]].spec)

    def _solve(self, stage: Stage) -> None:
        started, names, recipe = time.monotonic(), self._solved(stage), self._recipe(stage)
        moments = self.moments(stage, recipe)
        # Products over tokens leave holes in the heap, which the solver would come on top of, and the other way round.
        release()
        hessian = moments.hessian()
        del moments
        for name in names:
            self._solve_matrix(name, hessian, recipe)
            now = time.monotonic()
            self.found[name]["seconds"] = now - started
            started = now
        release()

    def _solve_matrix(self, name: str, hessian: torch.Tensor, recipe: Recipe) -> None:
        import torch

        row = self.rows[name]
        dtype = getattr(torch, STORED_FLOATS[row.dtype])
        solved = solve_matrix(name, self.weights.dense(name), hessian, row.spec, dtype, recipe)
        self.weights.set_quantized(name, restored(solved.quantized))
        packed: Any = packed_tensors(name, *solved.quantized, row.num_bits)
        self.tensors |= {key: torch.as_tensor(value) for key, value in packed.items()}
        self.found[name] = {"output_error": solved.error, "rtn_output_error": solved.rtn_error}

    def moments(self, stage: Stage, recipe: Recipe, kind: str = QUANTIZED) -> Moments:
        """Sums over all calibration tokens of what enters a stage, in the model quantized so far or the dense one."""
        size = self.weights.dense(stage.modules[0]).shape[1]
        moments = Moments(size, magnitudes=kind == DENSE)
        for start, stop in self.streams.ranges():
            rows, stream = self._rows(kind, stage, start, stop)
            weight = self._even(stage, rows, stream) if recipe.even and stream is not None else None
            plain = kind == DENSE or weight is not None
            moments.add(rows.float() if plain else to_sum(rows, self.options.compute_dtype), weight)
        return moments

    def _rows(self, kind: str, stage: Stage, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden = self.streams.read(self._source if kind == QUANTIZED else kind, self.index, start, stop)
        if kind == QUANTIZED and stage is self._kept:
            rows = self.streams.read(ENTERING, self.index, start, stop)
            return rows.flatten(0, 1), hidden.flatten(0, 1)
        with self.weights.using(kind):
            rows, stream = rows_entering(self.parts, stage, self.layer, hidden)
        return rows, stream

    def _even(self, stage: Stage, rows: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """The inverse energy of every token in the residual stream behind a stage: what norms divide by."""
        with products(self.options.compute_dtype):
            after = stream + rows @ self.weights.dense(stage.modules[0]).T
        return 1 / (after.square().mean(1) + _LEAST_ENERGY)
