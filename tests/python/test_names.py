"""What a tensor is, by its name: checked against the modules that transformers builds for several families."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtale import names

LAYER = "model.layers.3."


@pytest.mark.parametrize(
    ("tensor", "shape", "role"),
    [
        (LAYER + "self_attn.q_proj.weight", (8, 8), names.LINEAR),
        (LAYER + "self_attn.q_proj.bias", (8,), names.OTHER),
        (LAYER + "self_attn.q_norm.weight", (8,), names.NORM),
        (LAYER + "mlp.gate.weight", (4, 8), names.OTHER),
        (LAYER + "mlp.experts.11.down_proj.weight", (8, 8), names.LINEAR),
        (LAYER + "mlp.experts.gate_up_proj", (4, 8, 8), names.OTHER),
        (LAYER + "mixer.conv1d.weight", (8, 1, 4), names.OTHER),
        ("model.embed_tokens.weight", (9, 8), names.EMBEDDING),
        ("model.norm.weight", (8,), names.NORM),
        ("lm_head.weight", (9, 8), names.HEAD),
        ("embed_out.weight", (9, 8), names.HEAD),
        ("vision_tower.encoder.layers.0.self_attn.q_proj.weight", (8, 8), names.OTHER),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), names.EMBEDDING),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", (8, 8), names.LINEAR),
        ("bert.pooler.dense.weight", (8, 8), names.OTHER),
    ],
)
def test_roles(tensor: str, shape: tuple[int, ...], role: str) -> None:
    assert names.role(tensor, shape) == role


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "olmo2", "gpt_neox", "opt"])
def test_linear_modules_of_decoders_are_found(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    extra: dict[str, Any] = {"pad_token_id": 0}
    if kind == "opt":
        extra |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **extra))
    modules = dict(model.named_modules())
    heads = {name for name, module in modules.items() if module is model.get_output_embeddings()}
    expected = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear)} - heads
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {names.module_of(name) for name, shape in state.items() if names.role(name, shape) == names.LINEAR}
    assert found == expected
    assert {names.block_index(name) for name in found} == {0, 1}


def test_shared_specs() -> None:
    keys = {part: names.shared_spec_key(f"{LAYER}self_attn.{part}_proj") for part in "qkvo"}
    assert keys["q"] == keys["k"] == keys["v"] is not None
    assert keys["o"] is None
    assert names.shared_spec_key(LAYER + "mlp.up_proj") == names.shared_spec_key(LAYER + "mlp.gate_proj")
    assert names.shared_spec_key(LAYER + "mlp.up_proj") != names.shared_spec_key("model.layers.4.mlp.gate_proj")
    assert names.shared_spec_key(LAYER + "mlp.down_proj") is None


def test_model_order_counts_blocks_as_numbers() -> None:
    ordered = ["model.embed_tokens", "model.layers.2.x", "model.layers.10.x", "lm_head", "model.norm"]
    assert sorted(set(ordered), key=names.model_order) == ordered


def test_block_index() -> None:
    assert names.block_index("model.layers.17.mlp.up_proj") == 17
    assert names.block_index("h.2.attn.q_proj") == 2
    assert names.block_index("lm_head") is None
