"""The steps that each method takes."""

from __future__ import annotations

from dataclasses import dataclass

from qtale.ptq.options import AUTO, SolverOptions
from qtale.spec import ResolvedSpec


@dataclass(frozen=True)
class Recipe:
    """What is done to a matrix, in this order; see ``benchmarks/README.md`` for what each step is worth.

    * ``awq``: input channels are scaled by AWQ's search before anything else (:mod:`qtale.ptq.awq`).
    * ``even``: tokens count by the inverse of their energy in the residual stream, or the first one outweighs all.
    * ``magr_alpha``: MagR's penalty, 0 for none; ``shrink``: the range that the codes cover, of the largest weight.
    * ``gptq``: codes by GPTQ, else to nearest; ``act_order``, ``damp`` as in :class:`SolverOptions`.
    * ``search``: ranges tried for every group, by the diagonal of the Hessian; 1 is the rule of rounding.
    * ``rounds`` of least-squares scales and coordinate descent on the codes.
    """

    awq: bool = False
    even: bool = False
    magr_alpha: float = 0.0
    magr_iterations: int = 150
    shrink: float = 1.0
    gptq: bool = False
    act_order: bool = False
    damp: float = 0.01
    search: int = 1
    rounds: int = 0


# Ranges from 1.1 to 0.4 of the largest weight, of both signs; finer grids measure no better.
_SEARCH = 29
# The paper's shrinking of scales after MagR by bits, per channel and in groups (MagR, NeurIPS 2024, section 4), where
# ranges are not searched: with GPTQ behind it, searching them gives far better models.
_SHRINK = {(3, False): 0.9, (2, False): 0.8, (3, True): 0.95, (2, True): 0.95}


def recipe_of(options: SolverOptions, spec: ResolvedSpec) -> Recipe:
    """The recipe of a method for one matrix."""
    if options.method == AUTO:
        order = True if options.act_order is None else options.act_order
        return Recipe(even=True, gptq=True, act_order=order, damp=options.damp, search=_SEARCH, rounds=2)
    steps = options.method.split("+")
    gptq, magr = "gptq" in steps, "magr" in steps
    grouped = spec.group_size > 0
    alpha = (1e-4 if grouped else 1e-3) if options.magr_alpha is None else options.magr_alpha
    return Recipe(
        awq="awq" in steps,
        magr_alpha=alpha if magr else 0.0,
        magr_iterations=options.magr_iterations,
        shrink=_SHRINK.get((spec.num_bits, grouped), 1.0) if magr and not gptq else 1.0,
        gptq=gptq,
        act_order=gptq if options.act_order is None else options.act_order and gptq,
        damp=options.damp,
        search=_SEARCH if gptq or "awq" in steps else 1,
    )
