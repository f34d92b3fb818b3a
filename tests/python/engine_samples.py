"""Tiny models of each member of the Llama family, for the tests of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from eval_samples import byte_tokenizer
from qtale.engine import Engine
from qtale.engine.sampling import token_sources

Floats = npt.NDArray[np.float32]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 257,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 0,
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.707,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
# Every feature of the family, each in a model of its own.
MEMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_wide_heads": ("llama", {"head_dim": 32}),
    "llama_odd_sizes": ("llama", {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "mistral": ("mistral", {"sliding_window": 24, "head_dim": 16}),
    "mistral_whole": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_types": (
        "qwen3",
        {
            "head_dim": 24,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
}


def config_of(kind: str, **changes: Any) -> Any:
    """A transformers config of one model_type."""
    return getattr(transformers, f"{CLASSES[kind]}Config")(**{**SIZES, **changes})


def make_model(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model; biases and norms too, which transformers starts at zero and one."""
    torch.manual_seed(seed)
    config = config_of(kind, **changes)
    model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.pad_token_id = 0
    return model


def save_model(model: PreTrainedModel, path: Path, tokenizer: bool = True, **options: Any) -> Path:
    """The folder of a model, with a tokenizer of one token a byte."""
    model.save_pretrained(path, **options)
    if tokenizer:
        byte_tokenizer().save_pretrained(path)
    return path


def ids_of(count: int, seed: int = 0) -> list[int]:
    """Random token ids, none of which ends a text."""
    return [int(token) for token in np.random.default_rng(seed).integers(1, 257, count)]


def torch_logits(model: PreTrainedModel, ids: list[int]) -> npt.NDArray[np.float32]:
    """What transformers gives after each token."""
    with torch.inference_mode():
        logits: npt.NDArray[np.float32] = model(torch.tensor([ids])).logits[0].float().numpy()
    return logits


def difference(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Largest difference of a logit as a share of the range of logits."""
    return float(np.abs(found - expected).max() / (expected.max() - expected.min()))


def forced_logits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, starts: list[list[int]], ends: list[list[int]]
) -> list[Floats]:
    """Logits that one call of ``generate`` chooses from, for each of ``starts``, which it continues with ``ends``."""
    numbers: dict[int, int] = {}
    rows: list[list[Floats]] = [[] for _ in starts]

    def numbered(*arguments: Any) -> list[Any]:
        sources = list(token_sources(*arguments))
        numbers.update((id(source), number) for number, source in enumerate(sources))
        return sources

    def forced(logits: Floats, sources: list[Any], *_: Any) -> list[int]:
        tokens = []
        for row, source in zip(logits, sources, strict=True):
            number = numbers[id(source)]
            tokens.append(ends[number][len(rows[number])])
            rows[number].append(row.copy())
        return tokens

    with monkeypatch.context() as patched:
        patched.setattr("qtale.engine.engine.token_sources", numbered)
        patched.setattr("qtale.engine.generate.choose", forced)
        found = engine.generate(starts, max(map(len, ends)), ignore_end=True)
    assert [list(generation.tokens) for generation in found] == ends
    return [np.stack(each) for each in rows]
