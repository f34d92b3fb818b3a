"""What a scored model costs: bytes, bits per weight, memory, speed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from qtale.integrations.engine_lm import EngineLM
    from qtale.integrations.lm_eval import QtaleLM
    from qtale.spec import QuantSpec


def size_facts(folder: Path, spec: QuantSpec | None) -> dict[str, Any]:
    """Parameters, bytes and bits per weight as stored, or as ``spec`` would store them; from headers alone."""
    from qtale.ptq.pipeline import quantize
    from qtale.report.inspect import inspect

    stored = inspect(folder) if spec is None else quantize(folder, None, spec, dry_run=True)
    return {
        "parameters": stored.parameters,
        "bytes": getattr(stored, "bytes" if spec is None else "bytes_after"),
        "bits_per_weight": stored.bits_per_weight,
        "bits_per_weight_quantized": stored.bits_per_weight_quantized,
    }


def speed_facts(lm: EngineLM | QtaleLM) -> dict[str, Any]:
    """Throughput of log-likelihood requests; tokens are those that went through the model, shared ones once."""
    seconds = lm.seconds or float("nan")
    return {
        "requests": lm.requests_done,
        "tokens": lm.tokens_done,
        "seconds": lm.seconds,
        "requests_per_second": lm.requests_done / seconds if lm.seconds else None,
        "tokens_per_second": lm.tokens_done / seconds if lm.seconds else None,
        "peak_memory_bytes": peak_memory(lm.device.type),
    }


def peak_memory(device_type: str) -> int:
    """Bytes: the process's peak resident set on a CPU, torch's peak allocation on CUDA."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
