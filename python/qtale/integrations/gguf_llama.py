"""What a GGUF file of the Llama family must hold, and the rope scaling that it states as a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from qtale.errors import CheckpointError, UnsupportedError
from qtale.integrations.gguf_header import GgufHeader

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TOKENIZERS = ("gpt2", "llama")
_ROPE_FACTORS = "rope_freqs.weight"
_ROPE_TOLERANCE = 1e-3
Shape = tuple[int, ...]


def check(header: GgufHeader) -> None:
    """Raise UnsupportedError for what cannot be imported, CheckpointError for a file that contradicts itself."""
    architecture = header.architecture
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{header.path}: import-gguf reads {', '.join(ARCHITECTURES)} (files of Mistral, SmolLM and "
            f"TinyLlama call themselves llama), not {architecture!r}; use transformers' own gguf_file= for it."
        )
    _check_features(header)
    _check_tensors(header)
    tokens = header.arrays.get("tokenizer.ggml.tokens")
    rows = header.tensors["token_embd.weight"].shape[0]
    if tokens != rows or header.values.get(f"{architecture}.vocab_size", rows) != rows:
        raise CheckpointError(f"{header.path}: the vocabulary has {tokens} tokens, but the embedding has {rows} rows.")


def _check_features(header: GgufHeader) -> None:
    values, prefix = header.values, header.architecture
    window = _whole(header, f"{prefix}.attention.sliding_window")
    refused = {
        "several files (split.count)": _whole(header, "split.count") > 1,
        "mixture of experts": _whole(header, f"{prefix}.expert_count") > 0,
        "scaled rope (rope.scaling.type)": values.get(f"{prefix}.rope.scaling.type", "none") != "none",
        "sliding window attention": 0 < window < header.number("context_length"),
        "another number of heads in each layer": f"{prefix}.attention.head_count" in header.arrays,
        "a tokenizer other than gpt2 or llama": values.get("tokenizer.ggml.model") not in _TOKENIZERS,
    }
    for feature, found in refused.items():
        if found:
            raise UnsupportedError(
                f"{header.path}: import-gguf cannot import {feature}; start from the model's HuggingFace folder."
            )


def _whole(header: GgufHeader, key: str) -> int:
    value = header.values.get(key)
    return value if isinstance(value, int) else 0


def _check_tensors(header: GgufHeader) -> None:
    required, optional = _expected(header)
    for name, shape in required.items():
        if name not in header.tensors:
            raise CheckpointError(f"{header.path}: the tensor {name!r} is missing from a {header.architecture} model.")
        _check_shape(header, name, shape)
    for name in header.tensors.keys() - required.keys():
        if name not in optional:
            raise UnsupportedError(
                f"{header.path}: import-gguf does not know the tensor {name!r} of a {header.architecture} model, and "
                "leaving it out would change the model."
            )
        _check_shape(header, name, optional[name])


def _check_shape(header: GgufHeader, name: str, shape: Shape) -> None:
    found = header.tensors[name].shape
    if found != shape:
        raise CheckpointError(f"{header.path}: the tensor {name!r} is {list(found)}, expected {list(shape)}.")


def _expected(header: GgufHeader) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Names and shapes of the tensors that must be there, and of those that may be."""
    hidden = header.number("embedding_length")
    embedding = header.tensors.get("token_embd.weight")
    vocabulary = embedding.shape[0] if embedding else 0
    layers = header.number("block_count")
    if layers > len(header.tensors):
        raise CheckpointError(
            f"{header.path}: {layers} layers are announced, but there are {len(header.tensors)} tensors."
        )
    required: dict[str, Shape] = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    optional: dict[str, Shape] = {"output.weight": (vocabulary, hidden)}
    if header.architecture == "llama":
        optional[_ROPE_FACTORS] = (head_dim(header) // 2,)
    for layer in range(layers):
        required |= {f"blk.{layer}.{name}": shape for name, shape in _block(header, hidden)}
    return required, optional


def _block(header: GgufHeader, hidden: int) -> Iterator[tuple[str, Shape]]:
    heads, ffn, size = header.number("attention.head_count"), header.number("feed_forward_length"), head_dim(header)
    query, key = heads * size, _kv_heads(header, heads) * size
    yield from (("attn_norm.weight", (hidden,)), ("ffn_norm.weight", (hidden,)))
    yield from (("attn_q.weight", (query, hidden)), ("attn_k.weight", (key, hidden)), ("attn_v.weight", (key, hidden)))
    yield from (("attn_output.weight", (hidden, query)), ("ffn_down.weight", (hidden, ffn)))
    yield from (("ffn_gate.weight", (ffn, hidden)), ("ffn_up.weight", (ffn, hidden)))
    if header.architecture == "qwen2":
        yield from (("attn_q.bias", (query,)), ("attn_k.bias", (key,)), ("attn_v.bias", (key,)))
    if header.architecture == "qwen3":
        yield from (("attn_q_norm.weight", (size,)), ("attn_k_norm.weight", (size,)))


def _kv_heads(header: GgufHeader, heads: int) -> int:
    stated = f"{header.architecture}.attention.head_count_kv" in header.values
    return header.number("attention.head_count_kv") if stated else heads


def head_dim(header: GgufHeader) -> int:
    """Elements of one head: llama states it as rope.dimension_count, qwen3 as attention.key_length."""
    key = {"llama": "rope.dimension_count", "qwen3": "attention.key_length"}.get(header.architecture, "")
    if f"{header.architecture}.{key}" in header.values:
        return header.number(key)
    heads, hidden = header.number("attention.head_count"), header.number("embedding_length")
    if hidden % heads:
        raise CheckpointError(f"{header.path}: {heads} heads do not divide the embedding length {hidden}.")
    return hidden // heads


def rope_scaling(header: GgufHeader, theta: float) -> dict[str, Any] | None:
    """Llama 3.1's rope scaling, which a GGUF file states as one factor for each frequency; None where it has none.

    transformers' loader leaves that tensor out. The factors are those of ``rope_type`` "llama3" with low and high
    frequency factors 1 and 4 and 8192 original positions, or UnsupportedError is raised.
    """
    tensor = header.tensors.get(_ROPE_FACTORS)
    if tensor is None:
        return None
    known = tensor.type == "F32"
    if known:
        found = np.fromfile(header.path, dtype="<f4", count=tensor.shape[0], offset=tensor.offset)
        factor = round(float(found.max()), 2)
        known = np.allclose(found, _llama3_factors(len(found), theta, factor), rtol=_ROPE_TOLERANCE)
    if not known:
        raise UnsupportedError(
            f"{header.path}: the rope factors in {_ROPE_FACTORS} are not those of Llama 3.1; start from the model's "
            "HuggingFace folder instead."
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _llama3_factors(count: int, theta: float, factor: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    wavelengths = 2 * math.pi * theta ** (np.arange(count) / count)
    smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
