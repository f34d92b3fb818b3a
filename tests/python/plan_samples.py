"""A small random Llama and importance files for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qtale.checkpoint import fingerprint
from qtale.importance.file import Importance

LAYERS = 4
SIZES: dict[str, Any] = {
    **{"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"num_hidden_layers": LAYERS, "vocab_size": 64, "max_position_embeddings": 64},
}
PARTS = (*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))
MODULES = [f"model.layers.{layer}.{part}" for layer in range(LAYERS) for part in PARTS]


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
