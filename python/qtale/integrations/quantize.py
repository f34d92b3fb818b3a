"""``qtale.quantize``: a dense model folder and, for calibrated methods, a text in; a compressed-tensors folder out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale.checkpoint import resolve
from qtale.errors import InputError
from qtale.layerwise.states import MAX_MEMORY
from qtale.ptq.options import RTN, SolverOptions
from qtale.spec import QuantSpec

if TYPE_CHECKING:
    from qtale.planner.plan import Plan
    from qtale.ptq.worklist import Overrides, QuantizeReport


def quantize(
    model: str | Path,
    out: str | Path | None,
    spec: QuantSpec | None = None,
    *,
    method: str | SolverOptions = RTN,
    calibration: str | Path = "bundled",
    tokens: Any = None,
    plan: Plan | str | Path | None = None,
    overrides: Overrides | None = None,
    resume: str | Path | None = None,
    max_memory: int = MAX_MEMORY,
    dry_run: bool = False,
    progress: bool = True,
) -> QuantizeReport:
    """Quantize a model's decoder blocks by ``method`` and write a new HF folder, as :func:`qtale.ptq.quantize` does.

    ``method`` is one of :data:`qtale.ptq.METHODS` or :class:`SolverOptions`, whose ``num_samples`` sequences of
    ``seq_len`` tokens are drawn from ``calibration`` ("bundled", "hub" or a UTF-8 text file, see
    :func:`qtale.integrations.calibration.calibrate`) with ``seed``, or are given as ``tokens`` [sequences, length].
    Raises what those two raise, and InputError for ``tokens`` or ``resume`` without a calibrated method.
    """
    from qtale.integrations.calibration import calibrate
    from qtale.layerwise.tokens import check_tokens
    from qtale.process import release
    from qtale.ptq.pipeline import quantize as write

    options = SolverOptions(method) if isinstance(method, str) else method
    if not options.calibrated and (tokens is not None or resume is not None):
        raise InputError("quantize: rounding to nearest takes no calibration tokens and nothing to resume; leave both.")
    if options.calibrated and not dry_run:
        if tokens is None:
            counts = (options.num_samples, options.seq_len, options.seed)
            tokens = calibrate(resolve(model), calibration, *counts).tokens
            # The tokenizer and what it made of the whole text take more than the tokens that were drawn.
            release()
        else:
            tokens = check_tokens(tokens, "quantize")
            options = dataclasses.replace(options, num_samples=len(tokens), seq_len=tokens.shape[1])
    return write(
        model,
        out,
        spec,
        plan=plan,
        overrides=overrides,
        options=options,
        tokens=tokens,
        resume=resume,
        max_memory=max_memory,
        dry_run=dry_run,
        progress=progress,
    )
