"""How the codes of a quantized matrix are found: plain settings, checked when they are made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from qtale.errors import InputError
from qtale.ptq import products

RTN, AUTO = "rtn", "auto"
METHODS = (RTN, "gptq", "awq", "magr+gptq", "magr+rtn", AUTO)
_AUTO_TUNE_STEPS = 64
_COUNTS = (("num_samples", 1), ("seq_len", 2), ("seed", 0), ("magr_iterations", 1), ("awq_steps", 2))


@dataclass(frozen=True)
class SolverOptions:
    """Settings of a calibrated quantization; every one of them is part of what a resumed run must repeat.

    * ``method``: one of ``METHODS``; "rtn" needs no calibration, "auto" is the recipe that measured best for the bits.
    * ``num_samples`` sequences of ``seq_len`` tokens are drawn from the calibration text with ``seed``.
    * ``act_order``: columns are rounded in the order of falling input energy (GPTQ's act-order); scales belong to the
      groups of the original order, so that it costs nothing later. None leaves it to the method.
    * ``damp``: share of the mean of the Hessian's diagonal that is added to it.
    * ``magr_alpha`` (None: 1e-3 per channel, 1e-4 in groups), ``magr_iterations``: MagR's penalty and number of steps.
    * ``tune_steps``: steps of end-to-end tuning after the layers (:mod:`qtale.ptq.tune`), None: 64 for "auto", else 0.
    * ``awq_steps``: points of AWQ's grid of exponents between 0 and 1.
    * ``compute_dtype``: what enters the products of the layers as they run over the calibration tokens is rounded to,
      "float32", "bfloat16" or "auto": bfloat16 where the processor has instructions for it. Solvers keep float32; with
      AMX sums of squares of inputs that do not weigh their tokens are of rounded inputs, too.
    """

    method: str = RTN
    num_samples: int = 128
    seq_len: int = 512
    seed: int = 0
    act_order: bool | None = None
    damp: float = 0.01
    magr_alpha: float | None = None
    magr_iterations: int = 150
    awq_steps: int = 20
    tune_steps: int | None = None
    compute_dtype: str = products.AUTO

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"quantize: method {self.method!r} is not known; use one of {', '.join(METHODS)}.")
        for name, least in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"quantize: {name} {value!r} must be a whole number of at least {least}.")
        if self.compute_dtype not in products.COMPUTE_DTYPES:
            raise InputError(
                f"quantize: compute_dtype {self.compute_dtype!r} is not known; use one of "
                f"{', '.join(products.COMPUTE_DTYPES)}."
            )
        if self.tune_steps is not None and (type(self.tune_steps) is not int or self.tune_steps < 0):
            raise InputError(f"quantize: tune_steps {self.tune_steps!r} must be a whole number, or None.")
        if not 0 < self.damp <= 1:
            raise InputError(f"quantize: damp {self.damp!r} must be above 0 and at most 1; 0.01 is the default.")
        if self.magr_alpha is not None and not 0 < self.magr_alpha < 1:
            raise InputError(f"quantize: magr_alpha {self.magr_alpha!r} must lie between 0 and 1; None is the default.")

    @property
    def tuning(self) -> int:
        """Steps of end-to-end tuning."""
        if self.tune_steps is not None:
            return self.tune_steps
        return _AUTO_TUNE_STEPS if self.method == AUTO else 0

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at activations."""
        return self.method != RTN

    def to_json(self) -> dict[str, Any]:
        """A JSON object of all settings, with what the automatic ones stand for here."""
        return {**dataclasses.asdict(self), "compute_dtype": products.resolved(self.compute_dtype)}
