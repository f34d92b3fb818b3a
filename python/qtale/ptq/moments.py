"""Sums over calibration tokens of what enters a stage: all that the solvers need to know of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ROWS = 128


class Moments:
    """Weighted sums over tokens of the rows x [tokens, in] that enter a stage whose input is ``size`` wide.

    x^T x is kept in float64, and with ``magnitudes`` the sum of |x|.
    """

    def __init__(self, size: int, magnitudes: bool = False) -> None:
        import torch

        self._upper = torch.zeros(size, size, dtype=torch.float64)
        self._magnitude = torch.zeros(size, dtype=torch.float64) if magnitudes else None
        self.total = 0.0

    def add(self, rows: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Count rows, each by its ``weight`` [tokens] or by 1."""
        from qtale import solve

        solve.accumulate_gram(rows, self._upper, weight)
        if self._magnitude is not None:
            self._magnitude += (rows.abs() if weight is None else rows.abs() * weight[:, None]).sum(0)
        self.total += len(rows) if weight is None else float(weight.sum())

    def hessian(self) -> torch.Tensor:
        """The mean of x^T x, float32 [in, in], symmetric."""
        import torch

        size = len(self._upper)
        full = torch.zeros(size, size)
        # Some rows at a time: no more than sums and result need be in memory. Below the diagonal nothing was summed.
        for start in range(0, size, _ROWS):
            stop = start + _ROWS
            rows = self._upper[start:stop, start:].div(max(self.total, 1e-30)).float()
            full[start:stop, start:] = rows
            full[start:, start:stop] += rows.T
        full.diagonal().mul_(0.5)
        return full

    def magnitude(self) -> torch.Tensor:
        """The mean of |x|, float32 [in]."""
        assert self._magnitude is not None, "asked for when the sums began"
        return (self._magnitude / max(self.total, 1e-30)).float()
