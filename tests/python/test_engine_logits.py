"""Logits of the engine against transformers in float32, for every member of the family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import qtale
from engine_samples import MEMBERS, ROPES, difference, ids_of, make_model, save_model, torch_logits
from qtale import QuantSpec, _core
from qtale.errors import InputError

# Largest difference of a logit as a share of their range; sums of float32 in another order.
BOUND = 1e-4
# Keys and values of 16 bits.
KV_BOUND = 5e-3


@pytest.mark.parametrize("name", MEMBERS)
def test_each_member_gives_the_logits_of_transformers(tmp_path: Path, name: str) -> None:
    kind, changes = MEMBERS[name]
    model = make_model(kind, **changes)
    with qtale.load(save_model(model, tmp_path / "model", tokenizer=False)) as engine:
        for count in (1, 40, 90):
            ids = ids_of(count, seed=count)
            assert difference(engine.logits(ids), torch_logits(model, ids)) < BOUND


@pytest.mark.parametrize("name", ROPES)
def test_each_rotary_scaling_gives_the_logits_of_transformers(tmp_path: Path, name: str) -> None:
    model = make_model("llama", rope_parameters=ROPES[name], max_position_embeddings=256)
    engine = qtale.load(save_model(model, tmp_path / "model", tokenizer=False))
    ids = ids_of(200)
    assert difference(engine.logits(ids), torch_logits(model, ids)) < BOUND


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_configs_give_the_logits_of_transformers(tmp_path_factory: Any, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    kv_heads = data.draw(st.sampled_from([1, 2, 3]))
    changes: dict[str, Any] = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * data.draw(st.sampled_from([1, 2, 4])),
        "num_hidden_layers": data.draw(st.integers(1, 3)),
        "intermediate_size": data.draw(st.sampled_from([8, 33, 96])),
        "vocab_size": data.draw(st.sampled_from([257, 300])),
        "tie_word_embeddings": data.draw(st.booleans()),
        "rms_norm_eps": data.draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "rope_parameters": data.draw(st.sampled_from(list(ROPES.values()))),
        "attention_bias": kind in ("llama", "qwen3") and data.draw(st.booleans()),
        "mlp_bias": kind == "llama" and data.draw(st.booleans()),
    }
    changes["head_dim"] = data.draw(st.sampled_from([8, 16, 24]))
    changes["hidden_size"] = changes["num_attention_heads"] * data.draw(st.sampled_from([8, 10]))
    if kind == "qwen2":
        del changes["head_dim"]
    if kind != "llama":
        window = data.draw(st.sampled_from([None, 1, 7, 64]))
        changes |= {"sliding_window": window, "use_sliding_window": window is not None, "max_window_layers": 1}
    changes = {key: value for key, value in changes.items() if value or key not in ("attention_bias", "mlp_bias")}
    model = make_model(kind, **changes)
    engine = qtale.load(save_model(model, tmp_path_factory.mktemp("model") / "model", tokenizer=False))
    ids = ids_of(data.draw(st.integers(1, 80)))
    assert difference(engine.logits(ids), torch_logits(model, ids)) < BOUND


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_16_bits_give_what_their_weights_mean(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save_model(make_model("llama").to(dtype), tmp_path / "model", tokenizer=False)
    expected = torch_logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), ids_of(60))
    assert difference(qtale.load(path, kv_dtype="float32").logits(ids_of(60)), expected) < BOUND
    assert difference(qtale.load(path).logits(ids_of(60)), expected) < KV_BOUND


def test_bfloat16_is_as_near_as_in_transformers(tmp_path: Path) -> None:
    if not _core.has_bfloat16():
        pytest.skip("this CPU has no products of bfloat16 numbers")
    model, ids = make_model("llama", hidden_size=128, head_dim=32), ids_of(60)
    path = save_model(model.bfloat16(), tmp_path / "model", tokenizer=False)
    plain = torch_logits(model, ids)
    exact = torch_logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), ids)
    engine = qtale.load(path, compute="bfloat16", kv_dtype="float32")
    assert 0 < difference(engine.logits(ids), exact) < difference(plain, exact)
    some = qtale.load(path, compute="bfloat16", kv_dtype="float32", num_threads=1)
    np.testing.assert_array_equal(some.logits(ids[:7]), engine.logits(ids)[:7])


def test_bfloat16_is_refused_where_the_kernels_lack_it(tmp_path: Path) -> None:
    path = save_model(make_model("llama"), tmp_path / "model", tokenizer=False)
    before = _core.cpu_isa()
    _core.set_cpu_isa("generic")
    try:
        with pytest.raises(InputError, match=r"'bfloat16' needs a CPU .*generic; use 'float'"):
            qtale.load(path, compute="bfloat16")
    finally:
        _core.set_cpu_isa(before)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_models_give_what_load_torch_gives(tmp_path: Path, bits: int, symmetric: bool) -> None:
    path = save_model(make_model("qwen2"), tmp_path / "model", tokenizer=False)
    qtale.quantize(path, tmp_path / "packed", spec=QuantSpec(bits, 32, symmetric), progress=False)
    expected = torch_logits(qtale.load_torch(tmp_path / "packed", compute="float"), ids_of(60))
    assert difference(qtale.load(tmp_path / "packed", compute="float").logits(ids_of(60)), expected) < BOUND
    # Activations of 8 bits, three blocks deep.
    assert difference(qtale.load(tmp_path / "packed").logits(ids_of(60)), expected) < 0.1


def test_a_context_longer_than_a_pass_is_read_in_chunks(tmp_path: Path) -> None:
    model = make_model("mistral", sliding_window=100, max_position_embeddings=1500, num_hidden_layers=2)
    engine = qtale.load(save_model(model, tmp_path / "model", tokenizer=False))
    ids = ids_of(1300)
    assert difference(engine.logits(ids), torch_logits(model, ids)) < BOUND
    assert engine.report.passes == 3
    assert engine.report.tokens == 1300
    assert engine.report.executed == [1300, 1300]


def test_skipped_layers_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    model = make_model("llama")
    engine = qtale.load(save_model(model, tmp_path / "model", tokenizer=False))
    whole = engine.logits(ids_of(30))
    engine.set_depth([0, 2])
    found = engine.logits(ids_of(30))
    assert engine.report.execution_ratio == [1.0, 0.0, 1.0]
    del model.model.layers[1]
    model.model.layers[1].self_attn.layer_idx = 1
    model.config.num_hidden_layers = 2
    assert difference(found, torch_logits(model, ids_of(30))) < BOUND
    engine.set_depth(None)
    assert (engine.logits(ids_of(30)) == whole).all()
    with pytest.raises(InputError, match="no layer 3"):
        engine.set_depth([3])


def test_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    path = save_model(make_model("llama"), tmp_path / "model", tokenizer=False)
    one, two = qtale.load(path, num_threads=1, bits=4), qtale.load(path, num_threads=2, bits=4)
    assert (one.logits(ids_of(100)) == two.logits(ids_of(100))).all()


def test_wrong_ids_and_lengths_are_told(tmp_path: Path) -> None:
    engine = qtale.load(save_model(make_model("llama"), tmp_path / "model", tokenizer=False), context=20)
    for wrong, message in (([], "empty"), ([257], "257"), ([-1], "-1"), ([1.5], "1.5"), ([1] * 21, "21 tokens")):
        with pytest.raises(InputError, match=message):
            engine.logits(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="token ids only"):
        engine.logits("text")
    assert engine.logits(np.array([1, 2, 3])).shape == (3, 257)
    engine.theta = 0.25
    assert engine.theta == 0.25
    with pytest.raises(InputError, match="theta"):
        engine.theta = 2
    engine.close()
    with pytest.raises(InputError, match="closed"):
        engine.logits([1])
    assert "closed" in repr(engine)
