"""In what products of calibration and tuning are computed: bfloat16 where the processor multiplies it faster."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from qtale import _core

if TYPE_CHECKING:
    import torch

FLOAT32, BFLOAT16, AUTO = "float32", "bfloat16", "auto"
COMPUTE_DTYPES = (AUTO, FLOAT32, BFLOAT16)


def resolved(compute_dtype: str) -> str:
    """The dtype that "auto" stands for on this machine."""
    if compute_dtype != AUTO:
        return compute_dtype
    return BFLOAT16 if "avx512_bf16" in _core.cpu_isas() else FLOAT32


def products(compute_dtype: str) -> AbstractContextManager[Any]:
    """A context in which torch rounds what enters matrix products to ``compute_dtype``; sums are float32."""
    import torch

    if resolved(compute_dtype) == FLOAT32:
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16)


def input_sums(compute_dtype: str) -> str:
    """What unweighted sums of squares of inputs are made of: bfloat16 where products round to it and AMX sums it."""
    gains = resolved(compute_dtype) == BFLOAT16 and "avx512_amx" in _core.cpu_isas()
    return BFLOAT16 if gains else FLOAT32


def to_sum(rows: torch.Tensor, compute_dtype: str) -> torch.Tensor:
    """The rows that enter a product as the sums of their squares take them."""
    import torch

    return rows.to(getattr(torch, input_sums(compute_dtype)))
