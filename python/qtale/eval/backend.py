"""Which of qtale's two ways to run scores a model: the engine in C++, or PyTorch."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qtale.errors import InputError, UnsupportedError
from qtale.eval.options import EvalOptions
from qtale.spec import QuantSpec

if TYPE_CHECKING:
    from qtale.integrations.engine_lm import EngineLM

logger = logging.getLogger("qtale")


def engine_lm(options: EvalOptions, folder: Path, spec: QuantSpec | None) -> EngineLM | None:
    """The folder on the engine, or None where torch is asked for or is the only one that runs it.

    Keys and values are kept in float32, as torch keeps them, unless the options say otherwise. Raises InputError or
    UnsupportedError where the engine is asked for and cannot run the model as asked, or torch runs it with options of
    the engine.
    """
    if options.backend == "torch":
        refuse_engine_options(options)
        return None
    reason = _reason_for_torch(options)
    if reason is None:
        try:
            return _loaded(options, folder, spec)
        except UnsupportedError as error:
            reason = str(error)
    if options.backend == "engine":
        raise UnsupportedError(f"--backend engine: {reason}")
    logger.info("eval: PyTorch scores this model; %s", reason)
    refuse_engine_options(options)
    return None


def refuse_engine_options(options: EvalOptions) -> None:
    """InputError where an option of the engine is given."""
    given = (options.kv_dtype, *asdict(options.routing).values(), options.lm_head_bits, options.threads)
    if any(value is not None for value in given):
        raise InputError(
            "--kv-dtype, --kv-rule, --theta, --depth, --lm-head-bits, --threads: are options of the engine, but "
            "PyTorch scores this model."
        )


def _reason_for_torch(options: EvalOptions) -> str | None:
    """What was asked for that the engine does not do."""
    if options.device != "cpu":
        return f"the engine computes on the CPU, not on {options.device!r}."
    if options.dtype not in ("default", "auto", "float32"):
        return f"the engine's activations are float32, not {options.dtype}."
    if options.trust_remote_code:
        return "the engine never runs a model's own code."
    return None


def _loaded(options: EvalOptions, folder: Path, spec: QuantSpec | None) -> EngineLM:
    import qtale
    from qtale.engine.overrides import apply_overrides
    from qtale.integrations.engine_lm import EngineLM
    from qtale.integrations.scoring_model import load_tokenizer

    engine = qtale.load(
        folder,
        compute=options.compute,
        bits=None if spec is None else spec.num_bits,
        group_size="auto" if spec is None else spec.group_size,
        symmetric=True if spec is None else spec.symmetric,
        lm_head_bits=options.lm_head_bits,
        num_threads=options.threads,
        kv_dtype=options.kv_dtype or "float32",
        kv_rule=options.routing.kv_rule,
    )
    apply_overrides(options.routing, engine)
    return EngineLM(engine, load_tokenizer(folder), max_length=options.max_length)
