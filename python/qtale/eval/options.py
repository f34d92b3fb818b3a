"""What an evaluation is asked to do. Plain data, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qtale.errors import InputError
from qtale.ptq.options import METHODS, RTN
from qtale.routing import RoutingOverrides
from qtale.spec import QuantSpec

DEMO = "demo"
BACKENDS = ("auto", "engine", "torch")
# lm-eval's defaults: Python's random, numpy, torch, and the choice of few-shot examples.
SEEDS = (0, 1234, 1234, 1234)


@dataclass(frozen=True)
class EvalOptions:
    """Options of ``qtale.eval.evaluate``; those of lm-eval have its names and meanings.

    ``spec`` quantizes a dense model: in memory where ``method`` is "rtn", else by calibration into a folder that is
    kept (:func:`qtale.integrations.quantized_cache.quantized_folder`). ``baseline`` scores a dense model too: "" the
    one that is quantized, else a folder or hub name. ``limit`` is a number of documents a task, below 1 a share.
    ``backend`` is "engine" (C++), "torch", or "auto": the engine where it runs the model as asked. ``lm_head_bits``,
    ``threads``, ``kv_dtype`` and ``routing`` are the engine's; ``routing`` is for the model, not for its baseline.
    ``perplexity_windows`` bounds the windows of wikitext's perplexity (default: ``limit`` if it is a number, else all).
    """

    tasks: tuple[str, ...]
    model: str = DEMO
    spec: QuantSpec | None = None
    method: str = RTN
    baseline: str | None = None
    compute: str = "int16"
    backend: str = "auto"
    lm_head_bits: int | None = None
    threads: int | None = None
    kv_dtype: str | None = None
    routing: RoutingOverrides = field(default_factory=RoutingOverrides)
    dtype: str = "default"
    device: str = "cpu"
    data: str = "auto"
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: int | str = "auto"
    max_length: int | None = None
    output_path: Path | None = None
    log_samples: bool = False
    include_path: str | None = None
    gen_kwargs: str | None = None
    system_instruction: str | None = None
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool = True
    use_cache: str | None = None
    seed: tuple[int | None, int | None, int | None, int | None] = SEEDS
    trust_remote_code: bool = False
    perplexity_windows: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError(f"--backend {self.backend!r}: is not known; use {', '.join(BACKENDS)}.")
        if self.method not in METHODS:
            raise InputError(f"--method {self.method!r}: is not known; use {', '.join(METHODS)}.")
        if self.method != RTN and self.spec is None:
            raise InputError(f"--method {self.method}: says how to quantize; add --bits.")
        self._check_positive("threads", self.threads)
        self._check_positive("limit", self.limit)
        self._check_positive("max_length", self.max_length)
        self._check_positive("perplexity_windows", self.perplexity_windows)
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InputError(f"--num_fewshot {self.num_fewshot}: must be 0 or more.")
        if not str(self.batch_size).startswith("auto"):
            self._check_positive("batch_size", int(self.batch_size) if str(self.batch_size).isdecimal() else 0)
        if self.log_samples and self.output_path is None:
            raise InputError("--log_samples: writes files, so it needs --output_path too.")

    @staticmethod
    def _check_positive(name: str, value: float | None) -> None:
        if value is not None and not value > 0:
            raise InputError(f"--{name} must be a number above 0.")

    @property
    def windows(self) -> int | None:
        """How many windows of perplexity are asked for; None for all."""
        if self.perplexity_windows is None and self.limit is not None and self.limit >= 1:
            return int(self.limit)
        return self.perplexity_windows
