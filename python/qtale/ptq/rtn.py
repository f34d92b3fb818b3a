"""Round to nearest: each weight becomes the closest code of its group, without calibration data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qtale.ptq.worklist import ERROR_CHUNK
from qtale.spec import ResolvedSpec

if TYPE_CHECKING:
    import torch

    Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def round_to_nearest(weight: torch.Tensor, spec: ResolvedSpec) -> Quantized:
    """Codes int8 [out, in], scale [out, groups] in the weight's dtype and zero_point int8 or None of weight [out, in].

    Raises InputError where the weight holds NaN or infinities.
    """
    from qtale import ops

    return ops.quantize(weight, spec.num_bits, group_size=spec.group_size, symmetric=spec.symmetric)


def relative_error(weight: torch.Tensor, quantized: Quantized) -> float:
    """|ŵ - w| / |w| in Frobenius norms, computed in float32 pieces of rows; 0 for a zero matrix."""
    import torch

    from qtale import ops

    codes, scale, zero_point = quantized
    rows = max(1, ERROR_CHUNK // weight.shape[1])
    difference = norm = 0.0
    for start in range(0, weight.shape[0], rows):
        piece = slice(start, start + rows)
        zero = None if zero_point is None else zero_point[piece]
        exact = weight[piece].float()
        restored = ops.dequantize(codes[piece], scale[piece].float(), zero, dtype="float32")
        norm += float(torch.linalg.vector_norm(exact)) ** 2
        difference += float(torch.linalg.vector_norm(restored.sub_(exact))) ** 2
    return math.sqrt(difference / norm) if norm else 0.0
