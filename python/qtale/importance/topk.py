"""The token sets of hidden states: which tokens a hidden state points to, before any later layer changes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qtale import ops

if TYPE_CHECKING:
    import torch


def token_sets(hidden: torch.Tensor, matrix: torch.Tensor, k: int) -> npt.NDArray[np.int32]:
    """Rows of ``matrix`` [vocab, hidden] with the ``k`` largest products: int32 [rows, k], the largest first."""
    _, indices = ops.project_topk(hidden, matrix, k)
    return indices.numpy()  # type: ignore[no-any-return]
