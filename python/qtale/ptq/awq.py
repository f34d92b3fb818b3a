"""AWQ: inputs that matter get larger weights, and what makes them smaller ones (Lin et al., MLSys 2024).

The scaling leaves the dense model's function as it is: it goes into the norm before q/k/v and gate/up, into v for o
where every head has its own v, and into up for down.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from qtale.checkpoint.safetensors import STORED_FLOATS
from qtale.ptq.moments import Moments
from qtale.ptq.options import SolverOptions
from qtale.ptq.recipe import Recipe
from qtale.ptq.stages import Stage
from qtale.ptq.streams import DENSE
from qtale.ptq.weights import LayerWeights
from qtale.ptq.worklist import LayerRow

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from qtale.layerwise.model import LayeredModel

_logger = logging.getLogger("qtale")
# A Linear whose output channels are, but for an elementwise product, the input channels of another.
_FEEDS = {"down_proj": "up_proj", "o_proj": "v_proj"}
_LEAST = 1e-4


class Scaled(Protocol):
    """What :func:`scale_inputs` needs of a layer; :class:`qtale.ptq.layer.LayerSolver` is one."""

    model: LayeredModel
    parts: dict[str, nn.Module]
    weights: LayerWeights
    stages: list[Stage]
    rows: Mapping[str, LayerRow]
    options: SolverOptions

    def moments(self, stage: Stage, recipe: Recipe, kind: str) -> Moments:
        """Sums over the calibration tokens."""


def scale_inputs(solver: Scaled) -> dict[str, torch.Tensor]:
    """Scale the weights of a layer in place and return the norms that changed, by tensor name, as they will be stored.

    Inputs are those of the dense model. A stage that holds a matrix to be left dense, or that nothing can be folded
    into, stays as it is.
    """
    changed: dict[str, torch.Tensor] = {}
    for stage in solver.stages:
        if not all(name in solver.rows for name in stage.modules):
            continue
        norm = stage.norm if stage.norm is not None and _multiplies(solver.parts[stage.norm]) else None
        feeder = _feeder(solver, stage)
        if norm is None and feeder is None:
            _logger.info("%s: nothing before it can take AWQ's scales", stage.modules[0])
            continue
        scale = search(solver, stage)
        if norm is not None:
            scale = _fold_into_norm(solver, norm, scale, changed)
        else:
            solver.weights.dense(str(feeder)).div_(scale[:, None])
        for name in stage.modules:
            solver.weights.dense(name).mul_(scale)
    return changed


def search(solver: Scaled, stage: Stage) -> torch.Tensor:
    """The scale [in] of a grid s = mean|x|^r whose rounded weights err least on the outputs; r = 0 is no scaling."""
    from qtale import solve

    moments = solver.moments(stage, Recipe(), DENSE)
    hessian, magnitude = moments.hessian(), moments.magnitude().clamp_min(_LEAST)
    best, least = magnitude.new_ones(magnitude.shape), float("inf")
    for step in range(solver.options.awq_steps):
        scale = magnitude ** (step / solver.options.awq_steps)
        scale /= (scale.max() * scale.min()).sqrt()
        loss = 0.0
        for name in stage.modules:
            row = solver.rows[name]
            grid = (row.num_bits, row.group_size, row.symmetric)
            loss += solve.rounding_loss(solver.weights.dense(name), hessian, *grid, column_scale=scale)
        if loss < least:
            best, least = scale, loss
    return best


def _multiplies(norm: nn.Module) -> bool:
    """Whether the norm is x / rms(x) times its weight: some families add one to it."""
    import torch

    parameters = dict(norm.named_parameters())
    if set(parameters) != {"weight"}:
        return False
    weight = parameters["weight"]
    sample = torch.linspace(-1.0, 1.0, weight.numel()).reshape(1, -1)
    before = norm(sample)
    kept = weight.data
    weight.data = kept * 2
    try:
        return bool(torch.allclose(norm(sample), before * 2, rtol=1e-5, atol=1e-7))
    finally:
        weight.data = kept


def _feeder(solver: Scaled, stage: Stage) -> str | None:
    """The quantized Linear whose output channels are the stage's inputs."""
    if len(stage.modules) != 1:
        return None
    parent, _, leaf = stage.modules[0].rpartition(".")
    feeder = f"{parent}.{_FEEDS[leaf]}" if leaf in _FEEDS else ""
    if feeder not in solver.rows or solver.rows[feeder].shape[0] != solver.rows[stage.modules[0]].shape[1]:
        return None
    # An output bias is stored by itself and would have to change with the weight.
    return feeder if getattr(solver.parts[feeder], "bias", None) is None else None


def _fold_into_norm(solver: Scaled, norm: str, scale: torch.Tensor, changed: dict[str, torch.Tensor]) -> torch.Tensor:
    """Divide a norm's weight and return the scale that undoes exactly what its stored dtype made of it."""
    import torch

    parameter = solver.parts[norm].weight
    assert isinstance(parameter, torch.nn.Parameter), "norms that multiply have a weight"
    before = parameter.data
    dtype = getattr(torch, STORED_FLOATS[solver.model.folder.tensors[f"{norm}.weight"].dtype])
    after = (before / scale).to(dtype)
    usable = after.float().abs() > torch.finfo(dtype).tiny
    parameter.data = torch.where(usable, after.float(), before)
    changed[f"{norm}.weight"] = parameter.data.to(dtype)
    return torch.where(usable, before / after.float(), 1.0)
