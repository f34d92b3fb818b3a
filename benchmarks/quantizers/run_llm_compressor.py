"""One quantization by llm-compressor, as benchmarks/ptq.py starts it in that package's own environment."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import measured


def prepare(asked: dict[str, Any]) -> Callable[[], object]:
    """``asked``: model, out, spec, method (gptq or awq), tokens (a .npy file), dtype and threads."""
    import numpy as np
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(asked["threads"])
    if not torch.cuda.is_available():
        # Its AWQ pins memory, which torch refuses where there is no GPU.
        torch.Tensor.pin_memory = lambda self, *_, **__: self
    tokens = torch.from_numpy(np.load(asked["tokens"]))
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    group = asked["spec"]["group_size"]
    strategy = {"strategy": "channel"} if group == "channel" else {"strategy": "group", "group_size": group}
    weights = QuantizationArgs(num_bits=asked["spec"]["num_bits"], symmetric=asked["spec"]["symmetric"], **strategy)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    shared = {"config_groups": groups, "ignore": ["lm_head"]}
    recipe = [GPTQModifier(**shared)] if asked["method"] == "gptq" else [AWQModifier(), QuantizationModifier(**shared)]

    def step() -> None:
        model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=asked["dtype"])
        oneshot(model=model, dataset=loader, recipe=recipe, num_calibration_samples=len(tokens))
        model.save_pretrained(asked["out"], save_compressed=True)

    return step


if __name__ == "__main__":
    sys.exit(measured.main(prepare))
