"""GGUF files of a model's shape with random weights: what other engines take hardly depends on the values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qtale.errors import UnsupportedError

if TYPE_CHECKING:
    from qtale.engine.spec import DecoderSpec

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TYPES = ("Q4_0", "Q8_0", "F16")
_SCALE = 0.02
Bytes = npt.NDArray[np.uint8]


def write_shape(path: Path, spec: DecoderSpec, kind: str) -> Path:
    """Write a file whose matrices are ``kind`` (Q4_0, Q8_0, F16), the head as llama-quantize has it by default: Q6_K
    in a Q4_0 file (Q8_0 where its rows are no multiple of 256).

    Raises UnsupportedError for other kinds and rows that are no multiple of a block.
    """
    import gguf

    if kind not in TYPES:
        raise UnsupportedError(f"GGUF kind {kind!r} is not written here; use {', '.join(TYPES)}.")
    writer = gguf.GGUFWriter(path, ARCHITECTURES[spec.model_type])
    _add_metadata(writer, spec)
    pieces: dict[tuple[str, int, int], Any] = {}
    for name, rows, cols, wanted in _matrices(spec, kind):
        size = 256 if wanted == "Q6_K" else 32
        if cols % size and wanted != "F16":
            raise UnsupportedError(f"{name} has rows of {cols}, which {wanted} does not divide into blocks of {size}.")
        block = pieces.setdefault((wanted, rows, cols), _random(wanted, rows, cols))
        writer.add_tensor(name, block, raw_dtype=gguf.GGMLQuantizationType[wanted])
    for name, count in _vectors(spec):
        writer.add_tensor(name, np.ones(count, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_bytes_per_token(path: Path) -> int:
    """Bytes of the matrices that a decoded token reads: all, but the embedding only where it is the head too."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    untied = any(tensor.name == "output.weight" for tensor in tensors)
    return sum(int(t.n_bytes) for t in tensors if len(t.shape) > 1 and not (untied and t.name == "token_embd.weight"))


def _add_metadata(writer: Any, spec: DecoderSpec) -> None:
    writer.add_context_length(spec.positions)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, spec.vocab_size))])
    writer.add_token_scores([0.0] * spec.vocab_size)
    # unknown, control, control, normal …
    writer.add_token_types([2, 3, 3, *[1] * (spec.vocab_size - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _matrices(spec: DecoderSpec, kind: str) -> Iterator[tuple[str, int, int, str]]:
    hidden, between = spec.hidden_size, spec.intermediate_size
    head = kind if kind != "Q4_0" else "Q6_K" if hidden % 256 == 0 else "Q8_0"
    yield "token_embd.weight", spec.vocab_size, hidden, head if spec.tied else kind
    if not spec.tied:
        yield "output.weight", spec.vocab_size, hidden, head
    for layer in range(spec.num_layers):
        at = f"blk.{layer}"
        yield f"{at}.attn_q.weight", spec.query_width, hidden, kind
        yield f"{at}.attn_k.weight", spec.kv_width, hidden, kind
        yield f"{at}.attn_v.weight", spec.kv_width, hidden, kind
        yield f"{at}.attn_output.weight", hidden, spec.query_width, kind
        yield f"{at}.ffn_gate.weight", between, hidden, kind
        yield f"{at}.ffn_up.weight", between, hidden, kind
        yield f"{at}.ffn_down.weight", hidden, between, kind


def _vectors(spec: DecoderSpec) -> Iterator[tuple[str, int]]:
    yield "output_norm.weight", spec.hidden_size
    for layer in range(spec.num_layers):
        at = f"blk.{layer}"
        yield f"{at}.attn_norm.weight", spec.hidden_size
        yield f"{at}.ffn_norm.weight", spec.hidden_size
        if spec.qk_norm:
            yield f"{at}.attn_q_norm.weight", spec.head_dim
            yield f"{at}.attn_k_norm.weight", spec.head_dim
        if spec.qkv_bias:
            yield f"{at}.attn_q.bias", spec.query_width
            yield f"{at}.attn_k.bias", spec.kv_width
            yield f"{at}.attn_v.bias", spec.kv_width


# Per block: weights, bytes, where its float16 scale stands, and the spread of the codes that the scale is taken by.
_BLOCKS = {"Q4_0": (32, 18, 0, 4.6), "Q8_0": (32, 34, 0, 74.0), "Q6_K": (256, 210, 208, 18.5 * 74.0)}


def _random(kind: str, rows: int, cols: int) -> npt.NDArray[Any]:
    """Rows of random codes with one small scale for all blocks."""
    generator = np.random.default_rng(0)
    if kind == "F16":
        return (generator.standard_normal((rows, cols), dtype=np.float32) * _SCALE).astype(np.float16)
    weights, size, at, spread = _BLOCKS[kind]
    blocks: Bytes = np.frombuffer(generator.bytes(rows * cols // weights * size), np.uint8).reshape(-1, size).copy()
    blocks[:, at : at + 2] = np.frombuffer(np.float16(_SCALE / spread).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)
