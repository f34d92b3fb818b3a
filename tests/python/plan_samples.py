"""A small random Llama; importance files, plans and deployments of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qtale
from qtale.checkpoint import fingerprint
from qtale.deployment import Deployment
from qtale.importance.file import Importance
from qtale.planner import LayerBits, Options, Plan, PlannedModel

LAYERS = 4
SIZES: dict[str, Any] = {
    **{"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"num_hidden_layers": LAYERS, "vocab_size": 64, "max_position_embeddings": 64},
}
PARTS = (*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))
MODULES = [f"model.layers.{layer}.{part}" for layer in range(LAYERS) for part in PARTS]
# Widths of the parts of one layer; q, k, v and gate, up share theirs.
MIXED = dict(zip(PARTS, (3, 3, 3, 16, 4, 4, 8), strict=True))


def save_model(path: Path, tied: bool = False, dtype: torch.dtype = torch.float16, seed: int = 7) -> Path:
    """Four layers of random weights in one file."""
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).to(dtype).save_pretrained(path)
    return path


def save_importance(path: Path, model: Path, scores: Mapping[str, Sequence[float]], **fields: Any) -> Path:
    """An importance.json of the model, with any other fields."""
    about = {"fingerprint": fingerprint(model), "path": str(model), "model_type": "llama", "num_layers": LAYERS}
    settings = {"group_size": "auto", **fields.pop("settings", {})}
    Importance(model=about, data={}, settings=settings, scores=scores, **fields).write(path)
    return path


def make_plan(model: Path, *bits: int | dict[str, int], head: int = 16, group_size: int | str = 32) -> Plan:
    """A plan of the width of every layer, or of its parts as :data:`MIXED`."""
    layers = tuple(
        LayerBits(layer, modules=width) if isinstance(width, dict) else LayerBits(layer, width)
        for layer, width in enumerate(bits)
    )
    about = PlannedModel(fingerprint(model), "llama", LAYERS)
    return Plan(about, "knapsack", "none", None, 0, group_size, True, layers, head)


def deployer(backend: str, options: Options) -> Callable[..., Deployment]:
    """`qtale.deploy` on one of the two ways to run; ``options`` are for calls without a plan."""

    def deploy(model: Path, budget: int | str = "1GiB", **arguments: Any) -> Deployment:
        if "plan" not in arguments:
            arguments.setdefault("options", options)
        return qtale.deploy(model, budget, backend=backend, progress=False, **arguments)

    return deploy
