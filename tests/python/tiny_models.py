"""Tiny hand-made model folders for tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYER = "model.layers.0"


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_python(code: str, folder: Path) -> str:
    """What a fresh interpreter prints that runs ``code`` in ``folder``; fails with its error output."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_tiny(path: Path, **changes: Any) -> Path:
    """One decoder block of random weights in float32, ``changes`` replacing or adding tensors."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(16, 64),
        f"{LAYER}.input_layernorm.weight": torch.ones(64),
        f"{LAYER}.mlp.down_proj.weight": torch.randn(64, 96),
        **{f"{LAYER}.mlp.{part}_proj.weight": torch.randn(96, 64) for part in ("gate", "up")},
        **{f"{LAYER}.self_attn.{part}_proj.weight": torch.randn(64, 64) for part in "qkvo"},
        **{f"{LAYER}.self_attn.{part}_proj.bias": torch.randn(64) for part in "q"},
    }
    save_file({**tensors, **changes}, path / "model.safetensors")
    return path
