"""One quantization by qtale, as benchmarks/ptq.py starts it in a process of its own."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import measured


def prepare(asked: dict[str, Any]) -> Callable[[], object]:
    """What is timed.

    ``asked``: model, out, spec, options (as SolverOptions has them), fields of every Recipe that are not to be the
    method's own, tokens (a .npy file, or null) and threads.
    """
    import numpy as np
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 - peers import it as well before they are timed

    import qtale
    from qtale import _core
    from qtale.ptq import layer
    from qtale.ptq.options import SolverOptions

    torch.set_num_threads(asked["threads"])
    _core.set_num_threads(asked["threads"])
    spec, options = qtale.QuantSpec(**asked["spec"]), SolverOptions(**asked["options"])
    tokens = None if asked["tokens"] is None else np.load(asked["tokens"])
    quantize, recipe_of = qtale.quantize, layer.recipe_of
    layer.recipe_of = lambda options, spec: dataclasses.replace(recipe_of(options, spec), **asked["recipe"])

    def step() -> None:
        report = quantize(asked["model"], asked["out"], spec, method=options, tokens=tokens, progress=False)
        errors = [row for row in report.layers if row.output_error is not None]
        for row in errors[:: max(1, len(errors) // 12)]:
            print(f"{row.name}: {row.rtn_output_error:.3e} -> {row.output_error:.3e}", file=sys.stderr)

    return step


if __name__ == "__main__":
    sys.exit(measured.main(prepare))
