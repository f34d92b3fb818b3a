"""One quantization by GPTQModel, as benchmarks/ptq.py starts it in that package's own environment."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import measured


def prepare(asked: dict[str, Any]) -> Callable[[], object]:
    """``asked``: model, out, spec, tokens (a .npy file) and threads; the method is GPTQ with the package's settings."""
    import numpy as np
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import QuantizeConfig

    torch.set_num_threads(asked["threads"])
    tokens = np.load(asked["tokens"]).tolist()
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens]
    spec = asked["spec"]
    group = -1 if spec["group_size"] == "channel" else spec["group_size"]
    config = QuantizeConfig(bits=spec["num_bits"], group_size=group, sym=spec["symmetric"])

    def step() -> None:
        model = GPTQModel.load(asked["model"], config, device="cpu", backend=BACKEND.TORCH)
        model.quantize(data, batch_size=1)
        model.save(asked["out"])

    return step


if __name__ == "__main__":
    sys.exit(measured.main(prepare))
