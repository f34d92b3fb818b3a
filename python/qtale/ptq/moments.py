"""Sums over calibration tokens of what enters a stage: all that the solvers need to know of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Moments:
    """Weighted sums over tokens of the rows x [tokens, in] that enter a stage whose input is ``size`` wide.

    ``gram`` is x^T x in float64, ``magnitude`` the sum of |x|. With a dense model beside the quantized one, whose rows
    are d: ``drift`` is x^T (d - x), and ``residual`` is x^T (r_d - r) for the residual streams r that the stage's
    output is added to.
    """

    def __init__(self, size: int) -> None:
        import torch

        self._upper = torch.zeros(size, size, dtype=torch.float64)
        self._magnitude = torch.zeros(size, dtype=torch.float64)
        self.drift: torch.Tensor | None = None
        self.residual: torch.Tensor | None = None
        self.total = 0.0

    def add(self, rows: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Count rows, each by its ``weight`` [tokens] or by 1."""
        from qtale import solve

        solve.accumulate_gram(rows, self._upper, weight)
        self._magnitude += (rows.abs() if weight is None else rows.abs() * weight[:, None]).sum(0)
        self.total += len(rows) if weight is None else float(weight.sum())

    def add_dense(
        self,
        rows: torch.Tensor,
        dense: torch.Tensor,
        streams: tuple[torch.Tensor, torch.Tensor] | None,
        weight: torch.Tensor | None = None,
    ) -> None:
        """Count how far the dense model's rows and residual stream are away; ``streams`` is (r, r_d)."""
        scaled = rows if weight is None else rows * weight[:, None]
        self.drift = _plus(self.drift, scaled, dense - rows)
        if streams is not None:
            self.residual = _plus(self.residual, scaled, streams[1] - streams[0])

    def hessian(self) -> torch.Tensor:
        """The mean of x^T x, float32 [in, in], symmetric."""
        upper = self._upper.triu(1)
        return ((upper + upper.T + self._upper.diagonal().diag()) / max(self.total, 1e-30)).float()

    def magnitude(self) -> torch.Tensor:
        """The mean of |x|, float32 [in]."""
        return (self._magnitude / max(self.total, 1e-30)).float()

    def shift(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Mean of (what the dense ``weight`` [out, in] gives beyond the same weight here)^T x, [out, in], or None."""
        if self.drift is None:
            return None
        found = weight @ self.drift.T
        return (found if self.residual is None else found.add_(self.residual.T)) / max(self.total, 1e-30)


def _plus(total: torch.Tensor | None, rows: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if total is None:
        return rows.T @ other
    return total.addmm_(rows.T, other)
