"""Small random models of several architectures, and their importance scores computed on the whole model at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCAB, HIDDEN, LAYERS, LENGTH = 96, 64, 3, 14
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# A sliding window shorter than the sequences, where the architecture has one.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 5, "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "phi3": {"sliding_window": 6},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0},
    "olmo2": {},
}
ARCHITECTURES = tuple(_OWN)


def save_model(path: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random model as a folder, with weights large enough that every layer matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(len(kind))
    config = AutoConfig.for_model(kind, **{**_SHARED, **_OWN[kind], **changes})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(path)
    return path


def add_tokenizer(path: Path) -> Path:
    """A tokenizer of one word a token beside a model: token 5 is "w5", whatever it does not know is token 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, **{f"w{number}": number for number in range(1, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(path)
    return path


def write_words(path: Path, rows: int = 40, words: int = 6, seed: int = 5) -> Path:
    """A text of that tokenizer's words, in paragraphs; its folder is made."""
    numbers = np.random.default_rng(seed).integers(1, VOCAB, (rows, words))
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(" ".join(f"w{number}" for number in row) for row in numbers))
    return path


def load_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def some_tokens(sequences: int = 4, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCAB, (sequences, length))


def hidden_states(model: Any, tokens: np.ndarray) -> list[torch.Tensor]:
    """What enters layer 0 and what leaves every layer, before the final norm."""
    found: list[torch.Tensor] = []
    handles = [model.model.layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))]
    for layer in model.model.layers:
        handles.append(layer.register_forward_hook(lambda _, __, out: found.append(out.clone())))
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    for handle in handles:
        handle.remove()
    return found


def top_sets(hidden: torch.Tensor, matrix: torch.Tensor, k: int) -> list[set[int]]:
    return [set(row.tolist()) for row in torch.topk(hidden @ matrix.T, k).indices]


def plain_jaccard(model: Any, tokens: np.ndarray, k: int, matrix: str, norm: str, positions: str) -> np.ndarray:
    """LSAQ's importance [sequences, layers], with torch.topk and Python's sets."""
    weight = (model.lm_head if matrix == "lm_head" else model.model.embed_tokens).weight.detach()
    states = hidden_states(model, tokens)
    scores = np.zeros((len(tokens), len(states) - 1))
    for sequence in range(len(tokens)):
        rows = [state[sequence] if positions == "all" else state[sequence, -1:] for state in states]
        with torch.no_grad():
            sets = [top_sets(model.model.norm(row) if norm == "final" else row, weight, k) for row in rows]
        for layer in range(len(states) - 1):
            pairs = zip(sets[layer], sets[layer + 1], strict=True)
            scores[sequence, layer] = np.mean([1 - len(a & b) / len(a | b) for a, b in pairs])
    return scores


def linear_weights(model: Any, layer: int) -> dict[str, torch.Tensor]:
    modules = model.model.layers[layer].named_modules(prefix=f"model.layers.{layer}")
    return {name: module.weight for name, module in modules if isinstance(module, torch.nn.Linear)}


def rounded(weight: torch.Tensor, bits: int, group: int, scale_dtype: torch.dtype) -> torch.Tensor:
    """Symmetric round to nearest in plain torch."""
    groups = weight.detach().reshape(weight.shape[0], -1, group)
    half = 2 ** (bits - 1)
    scale = (groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)).to(scale_dtype).float()
    return ((groups / scale).round().clamp(-half, half - 1) * scale).reshape(weight.shape)


def plain_fisher(model: Any, tokens: np.ndarray, bits: int) -> dict[str, float]:
    """Predicted loss increase by module, from gradients of the whole model."""
    weights = {name: w for layer in range(LAYERS) for name, w in linear_weights(model, layer).items()}
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for row in torch.from_numpy(tokens):
        logits = model(row[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum")
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            squares[name] += gradient**2
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    changes = {name: rounded(weight, bits, 32, torch.float32) - weight.detach() for name, weight in weights.items()}
    return {name: float((squares[name] * changes[name] ** 2).sum()) / 2 / count for name in weights}


def plain_zd(model: Any, layer: int, tail: str) -> float:
    flat = torch.cat([weight.detach().double().flatten() for weight in linear_weights(model, layer).values()])
    z = (flat - flat.mean()) / flat.std(correction=0)
    return float(((z.abs() if tail == "both" else z) > 1).double().mean())


def plain_error(model: Any, layer: int, bits: int) -> float:
    weights = [weight.detach() for weight in linear_weights(model, layer).values()]
    errors = [rounded(weight, bits, 32, torch.float32) - weight for weight in weights]
    return math.sqrt(sum(float(e.norm()) ** 2 for e in errors) / sum(float(w.norm()) ** 2 for w in weights))
