"""MagR: smaller weights with the same products, before they are rounded (Zhang et al., NeurIPS 2024, algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_POWER_STEPS = 50
# The power method comes from below; a larger bound keeps the step size safe.
_MARGIN = 1.02


def shrink_magnitudes(
    weight: torch.Tensor, hessian: torch.Tensor, group_size: int, alpha: float, iterations: int
) -> torch.Tensor:
    """``weight`` [out, in] with smaller largest entries in every row, or group of ``group_size`` inputs (0: row).

    Minimises 1/2 (w - w0)^T H (w - w0) / lambda_max(H) + alpha * ||w||_inf for each by proximal gradient steps of size
    1; the objective falls with every step.
    """
    from qtale import ops, solve

    scaled = hessian / (largest_eigenvalue(hessian) * _MARGIN)
    found = weight.clone()
    for _ in range(iterations):
        # The matrix is symmetric, so it is its own transpose.
        found = solve.prox_linf(found.sub_(ops.matmul(found - weight, scaled)), alpha, group_size)
    return found


def largest_eigenvalue(matrix: torch.Tensor) -> float:
    """That of a symmetric positive semidefinite matrix, by the power method from a fixed start."""
    import torch

    vector = matrix.diagonal().clone()
    value = 0.0
    for _ in range(_POWER_STEPS):
        vector = matrix @ (vector / torch.linalg.vector_norm(vector).clamp_min(1e-30))
        value = float(torch.linalg.vector_norm(vector))
    return value
