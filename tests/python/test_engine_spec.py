"""Specs read from config.json, against what transformers makes of the same config."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine_samples import MEMBERS, ROPES, config_of
from qtale.engine.spec import read_spec
from qtale.errors import CheckpointError, UnsupportedError

ULP = 2.0**-23


def read(config: dict[str, Any]) -> Any:
    return read_spec(json.loads(json.dumps(config)), "folder")


def base(**changes: Any) -> dict[str, Any]:
    return {**config_of("llama").to_dict(), **changes}


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_frequencies_are_those_of_transformers(name: str, head_dim: int) -> None:
    config = config_of("llama", head_dim=head_dim, rope_parameters=ROPES[name])
    rotary = LlamaRotaryEmbedding(config)
    found = read(config.to_dict()).rope
    # torch's own power of float32 is off by up to a unit in the last place.
    np.testing.assert_allclose(found.inv_freq, rotary.inv_freq.numpy(), rtol=3 * ULP)
    assert found.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-15)


def test_both_spellings_of_rotary_parameters_are_read() -> None:
    for name, parameters in ROPES.items():
        new = read(base(rope_parameters=parameters)).rope
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        old = {**base(rope_scaling=scaling), "rope_theta": parameters["rope_theta"]}
        del old["rope_parameters"]
        assert read(old).rope == new, name
        older = {**old, "rope_scaling": {**scaling, "type": scaling["rope_type"]}}
        del older["rope_scaling"]["rope_type"]
        assert read(older).rope == new, name


def test_dynamic_scaling_grows_as_transformers_grows_it() -> None:
    config = config_of("llama", head_dim=64, rope_parameters=ROPES["dynamic"])
    rotary = LlamaRotaryEmbedding(config)
    rope = read(config.to_dict()).rope
    length = 700
    rotary(torch.zeros(1), torch.arange(length)[None])
    grown = rope.dynamic_factor * length / rope.dynamic_length - (rope.dynamic_factor - 1)
    base = rope.dynamic_base * grown ** (64 / 62)
    np.testing.assert_allclose(1 / base ** (np.arange(0, 64, 2) / 64), rotary.inv_freq.numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", MEMBERS)
def test_sizes_and_features_of_each_member(name: str) -> None:
    kind, changes = MEMBERS[name]
    config = config_of(kind, **changes)
    spec = read(config.to_dict())
    assert spec.model_type == kind
    assert spec.num_layers == 3
    assert spec.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert spec.tied == config.tie_word_embeddings
    types = getattr(config, "layer_types", None) or ["sliding_attention" if kind == "mistral" else ""] * 3
    window = getattr(config, "sliding_window", None) or 0
    assert spec.windows == tuple(window if each == "sliding_attention" else 0 for each in types)


def test_fields_that_are_missing_take_the_defaults_of_transformers() -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 257}
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        config = {**sizes, "num_attention_heads": 32, "model_type": kind}
        expected = config_of(kind).__class__(**sizes, num_attention_heads=32)
        spec = read(config)
        assert spec.num_kv_heads == expected.num_key_value_heads
        assert spec.positions == expected.max_position_embeddings
        assert spec.norm_eps == expected.rms_norm_eps
        assert spec.head_dim == (getattr(expected, "head_dim", None) or 8)
        assert spec.windows == ((4096,) * 2 if kind == "mistral" else (0, 0))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_scaling": {"type": "new"}}, "'new'"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attention_sinks": 4}, "attention_sinks"),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 3}, "'linear_attention'"),
    ],
)
def test_what_the_engine_does_not_run_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named) as caught:
        read(base(**changes))
    assert "qtale.load_torch" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"hidden_size": -64},
        {"hidden_size": "64"},
        {"hidden_size": 1 << 62},
        {"num_hidden_layers": 10**9},
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"head_dim": 1 << 40},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": 10**400},
        {"attention_bias": "yes"},
        {"rope_parameters": []},
        {"rope_parameters": {"rope_theta": 0}},
        {"rope_parameters": {"rope_theta": 1e-320}},
        {"rope_parameters": {"rope_type": "linear"}},
        {"rope_parameters": {"rope_type": "linear", "factor": "4"}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 0.5}},
        {"rope_parameters": {**ROPES["llama3"], "high_freq_factor": 1.0}},
        {"rope_parameters": {**ROPES["yarn"], "rope_theta": 1.0}},
        {"rope_parameters": {**ROPES["yarn"], "beta_fast": 1e-308, "rope_theta": 1.0000001}},
        {"model_type": "qwen2", "layer_types": ["full_attention"]},
        {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3},
        {"model_type": "qwen2", "max_window_layers": "x", "layer_types": None},
        {"model_type": "mistral", "sliding_window": 0},
    ],
)
def test_broken_values_are_refused(changes: dict[str, Any]) -> None:
    config = base(**changes)
    with pytest.raises(CheckpointError, match=r"^folder"):
        read_spec(config, "folder")
