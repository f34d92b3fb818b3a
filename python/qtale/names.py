"""What the tensors of a checkpoint are, told from their names alone: data and string rules, no model code, no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

LINEAR = "linear"
EMBEDDING = "embedding"
HEAD = "head"
NORM = "norm"
OTHER = "other"

# nn.Linear modules inside numbered blocks, by the last part of their name; every name that ends in "_proj" is one too.
LINEAR_LEAVES = frozenset(
    {
        *("fc1", "fc2", "fc_in", "fc_out", "c_attn", "c_fc", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        *("query_key_value", "query", "key", "value", "qkv", "Wqkv", "out_proj", "q_lin", "k_lin", "v_lin", "out_lin"),
        *("lin1", "lin2", "w1", "w2", "w3", "wq", "wk", "wv", "wo", "wi", "wi_0", "wi_1", "q", "k", "v", "o"),
        "kv_a_proj_with_mqa",
    }
)
HEAD_LEAVES = frozenset({"lm_head", "embed_out", "score", "classifier", "output_projection"})
EMBEDDING_LEAVES = frozenset({"wte", "wpe", "shared", "relative_attention_bias"})
OUTSIDE_DECODER = frozenset({"visual", "vision_tower", "vision_model", "audio_tower", "multi_modal_projector"})
# transformers' Conv1D keeps [in, out] where nn.Linear keeps [out, in].
TRANSPOSED_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
# Engines fuse these into one matrix, so they must share bits, groups and symmetry.
SHARED_SPECS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


def block_index(name: str) -> int | None:
    """Number of the block that a tensor or module lies in (``model.layers.7.mlp.up_proj`` → 7), or None outside."""
    match = _BLOCK.search(name)
    return int(match.group(1)) if match else None


def split_block(module: str) -> tuple[int, str] | None:
    """Block number and name inside the block: ``model.layers.7.mlp.up_proj`` → (7, ``mlp.up_proj``); None outside."""
    match = _BLOCK.search(module)
    return (int(match.group(1)), module[match.end() :]) if match else None


def module_of(tensor: str) -> str:
    """The module that owns a tensor: its name without the last part."""
    return tensor.rpartition(".")[0]


def role(tensor: str, shape: Sequence[int]) -> str:
    """What a tensor is: LINEAR (a Linear weight of a decoder block), EMBEDDING, HEAD, NORM or OTHER.

    Only a LINEAR is quantized. OTHER covers biases, MoE routers, vision towers and whatever the tables do not know.
    """
    module, _, kind = tensor.rpartition(".")
    leaf = module.rpartition(".")[2]
    if "norm" in leaf.lower() or leaf in ("ln_1", "ln_2", "ln_f"):
        return NORM
    if kind != "weight" or len(shape) != 2:
        return OTHER
    if leaf in HEAD_LEAVES:
        return HEAD
    if "embed" in leaf.lower() or leaf in EMBEDDING_LEAVES:
        return EMBEDDING
    if block_index(module + ".") is None or OUTSIDE_DECODER.intersection(module.split(".")):
        return OTHER
    return LINEAR if leaf.endswith("_proj") or leaf in LINEAR_LEAVES else OTHER


def shared_spec_key(module: str) -> str | None:
    """A key that is equal for modules which must share one spec (q/k/v, gate/up of one block); None where free."""
    parent, _, leaf = module.rpartition(".")
    for members in SHARED_SPECS:
        if leaf in members:
            return f"{parent}.{{{','.join(members)}}}"
    return None


def model_order(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """A sort key: embeddings, then blocks by number, then what follows them."""
    parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
    return block_index(f"{name}.") is None and "embed" not in name, parts
