"""What a model predicts after given hidden states, and how far two predictions lie apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from qtale.layerwise.model import LayeredModel

if TYPE_CHECKING:
    import torch

# Positions of each sequence at which predictions are compared, evenly spaced: the head is a large matrix.
KL_POSITIONS = 64


def predictions(model: LayeredModel, hidden: Iterable[torch.Tensor], length: int) -> torch.Tensor:
    """Log probabilities [positions, vocab] of the tokens after evenly spaced positions of every sequence.

    ``hidden`` are what leaves the last layer, float32 [n, length, hidden] each.
    """
    import torch

    chosen = torch.from_numpy(np.linspace(0, length - 1, min(KL_POSITIONS, length)).round().astype(np.int64))
    with model.head() as head, torch.no_grad():
        rows = [head(batch[:, chosen]).log_softmax(-1).flatten(0, 1) for batch in hidden]
    return torch.cat(rows)


def divergence(expected: torch.Tensor, predicted: torch.Tensor) -> float:
    """KL(expected || predicted) in nats per position, of log probabilities [positions, vocab]."""
    from torch.nn.functional import kl_div

    return float(kl_div(predicted, expected, log_target=True, reduction="batchmean"))
