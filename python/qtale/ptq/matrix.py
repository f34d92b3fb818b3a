"""Codes and scales of one matrix from the moments of its inputs: the steps of a recipe, in order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtale.errors import InputError
from qtale.ptq.magr import shrink_magnitudes
from qtale.ptq.recipe import Recipe
from qtale.ptq.rtn import round_to_nearest
from qtale.spec import ResolvedSpec

if TYPE_CHECKING:
    import torch

    from qtale.ptq.rtn import Quantized

_logger = logging.getLogger("qtale")
_MOST_DAMP = 1.0


@dataclass(frozen=True)
class Solved:
    """A solved matrix: how it will be stored, and its error on the calibration data beside that of rounding.

    Errors are the mean of |(ŵ - w) x|² over that of |w x|², x the calibration inputs.
    """

    quantized: Quantized
    error: float
    rtn_error: float


def solve_matrix(
    name: str,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    spec: ResolvedSpec,
    scale_dtype: torch.dtype,
    recipe: Recipe,
) -> Solved:
    """Quantize ``weight`` [out, in] float32 so that its products with the calibration inputs change least.

    ``hessian`` [in, in] float32 is the mean of x x^T over the inputs. Of what the recipe gives and rounding to nearest
    the better on the calibration data is taken. Raises InputError, with the matrix's name, for NaN in the Hessian.
    """
    if not bool(hessian.sum().isfinite()):
        raise InputError(f"{name}: its calibration inputs hold NaN or infinities; the layers before it are broken.")
    rounded = round_to_nearest(weight.to(scale_dtype), spec)
    best, rtn_loss = rounded, output_error(weight, hessian, rounded)
    loss = rtn_loss
    if bool(hessian.diagonal().any()):
        for found in _candidates(name, weight, hessian, spec, scale_dtype, recipe):
            now = output_error(weight, hessian, found)
            if now < loss:
                best, loss = found, now
    energy = max(float((weight @ hessian).mul_(weight).sum(dtype=_double())), 1e-30)
    return Solved(best, loss / energy, rtn_loss / energy)


def restored(quantized: Quantized) -> torch.Tensor:
    """The weight that is computed with, float32 [out, in]."""
    from qtale import ops

    codes, scale, zero_point = quantized
    return ops.dequantize(codes, scale.float(), zero_point, dtype="float32")  # type: ignore[no-any-return]


def output_error(target: torch.Tensor, hessian: torch.Tensor, quantized: Quantized) -> float:
    """tr(E H E^T) for E = restored - target: the mean of |(ŵ - w) x|² over the inputs."""
    error = restored(quantized).sub_(target)
    return float((error @ hessian).mul_(error).sum(dtype=_double()))


def _double() -> torch.dtype:
    import torch

    return torch.float64


def _candidates(
    name: str,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    spec: ResolvedSpec,
    scale_dtype: torch.dtype,
    recipe: Recipe,
) -> Iterator[Quantized]:
    """What the recipe gives, and after every further round again."""
    from qtale import solve

    target = weight
    if recipe.magr_alpha:
        target = shrink_magnitudes(weight, hessian, spec.group_size, recipe.magr_alpha, recipe.magr_iterations)
    scale, zero_point = _scales(target, hessian, spec, scale_dtype, recipe)
    order = _order(hessian, recipe.act_order)
    if recipe.gptq:
        factor = inverse_factor(name, hessian, order, recipe.damp)
        codes = solve.gptq(target, factor, spec.num_bits, scale=scale, zero_point=zero_point, order=order).codes
    else:
        codes = nearest_codes(target, scale, zero_point, spec)
    yield codes, scale, zero_point
    if not recipe.rounds:
        return
    damped = hessian.clone()
    damped.diagonal().add_(recipe.damp * hessian.diagonal().mean())
    for _ in range(recipe.rounds):
        scale, _ = solve.refit_scales(target, damped, spec.num_bits, codes, scale, zero_point)
        codes, changes = solve.refine_codes(
            target, damped, spec.num_bits, codes, scale, zero_point, order=order, sweeps=1
        )
        yield codes, scale, zero_point
        if not changes:
            return


def _scales(
    target: torch.Tensor, hessian: torch.Tensor, spec: ResolvedSpec, scale_dtype: torch.dtype, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from qtale import solve

    if recipe.search > 1:
        scale, zero_point = solve.search_scales(
            target,
            hessian.diagonal().contiguous(),
            spec.num_bits,
            group_size=spec.group_size,
            symmetric=spec.symmetric,
            scale_dtype=str(scale_dtype).removeprefix("torch."),
            steps=recipe.search,
            signed=spec.symmetric,
        )
        return scale, zero_point
    _, scale, zero_point = round_to_nearest(target.to(scale_dtype), spec)
    return (scale.float() * recipe.shrink).to(scale_dtype), zero_point


def _order(hessian: torch.Tensor, by_energy: bool) -> torch.Tensor | None:
    """The columns by falling input energy, int32; None as they stand."""
    import torch

    if not by_energy:
        return None
    return torch.argsort(hessian.diagonal(), descending=True, stable=True).to(torch.int32)


def nearest_codes(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, spec: ResolvedSpec
) -> torch.Tensor:
    """The nearest code of every weight on given grids, int8 [out, in]."""
    import torch

    grouped = weight.reshape(len(weight), scale.shape[1], -1) / scale.float()[..., None]
    if zero_point is not None:
        grouped += zero_point[..., None]
    low = -(1 << (spec.num_bits - 1))
    return grouped.round_().clamp_(low, -low - 1).nan_to_num_(0.0).to(torch.int8).reshape(weight.shape)


def inverse_factor(name: str, hessian: torch.Tensor, order: torch.Tensor | None, damp: float) -> torch.Tensor:
    """U upper triangular, float32, with (H + damp * mean(diag H))^-1 = U^T U, rows and columns in ``order``.

    H = R R^T by the Cholesky factor of the reversed matrix, and U = R^-1: one triangular inverse in place of the two
    factors and an inverse of GPTQ (Frantar et al., ICLR 2023). Inputs that are always zero count as independent ones.
    """
    import torch

    diagonal = hessian.diagonal().double()
    mean = float(diagonal.mean())
    diagonal = torch.where(diagonal == 0, mean, diagonal)
    # Backwards, for the factor; large matrices are gone as soon as they are used, for each takes in² doubles.
    index = torch.arange(len(hessian)) if order is None else order.long()
    index = index.flip(0)
    while damp <= _MOST_DAMP:
        matrix = hessian[index[:, None], index].double()
        matrix.diagonal().copy_(diagonal[index] + damp * mean)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        del matrix
        if not int(failed):
            upper = lower.flip(0, 1)
            del lower
            inverse = torch.eye(len(hessian), dtype=torch.float64)
            torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
            del upper
            return inverse.float().contiguous()
        damp *= 10
        _logger.warning("%s: its Hessian is singular; damped by %g of its mean diagonal", name, damp)
    raise InputError(f"{name}: its Hessian stays singular however it is damped; give more calibration data.")
