"""Caches with keys of 8 bits: when they are taken, how near they come, what they weigh, where they are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qtale
from engine_samples import ids_of, make_model, save_model
from plan_samples import make_plan
from qtale import Engine, _core
from qtale.errors import InputError

needs_keys = pytest.mark.skipif(not _core.has_int8_keys(32), reason="keys of 8 bits need AVX-512 BF16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in float16 with heads of 32."""
    model = make_model("llama", hidden_size=128, num_hidden_layers=4, max_position_embeddings=1024)
    return save_model(model.half(), tmp_path_factory.mktemp("keys") / "model", tokenizer=False)


def kv_dtype(engine: Engine) -> str:
    assert engine._model is not None
    return engine._model.kv_dtype


@needs_keys
def test_auto_takes_them_where_activations_have_8_bits_too(folder: Path, tmp_path: Path) -> None:
    assert kv_dtype(qtale.load(folder, bits=4)) == "int8-keys"
    assert kv_dtype(qtale.load(folder, bits=4, kv_dtype="float16")) == "float16"
    assert kv_dtype(qtale.load(folder, bits=4, compute="float")) == "float16"
    assert kv_dtype(qtale.load(folder)) == "float16"
    qtale.quantize(folder, tmp_path / "some", plan=make_plan(folder, 8, 16, 4, 8), progress=False)
    assert kv_dtype(qtale.load(tmp_path / "some")) == "float16"
    odd = save_model(make_model("llama", hidden_size=96).half(), tmp_path / "odd", tokenizer=False)
    assert kv_dtype(qtale.load(odd, bits=4)) == "float16"
    whole = save_model(make_model("llama", hidden_size=128), tmp_path / "whole", tokenizer=False)
    assert kv_dtype(qtale.load(whole, bits=4)) == "float32"


@needs_keys
def test_they_cost_less_than_8_bit_activations(folder: Path) -> None:
    ids = ids_of(600)
    exact = qtale.load(folder, bits=8, compute="float", kv_dtype="float32").logits(ids)
    rounded = qtale.load(folder, bits=8, kv_dtype="float32").logits(ids)
    keys = qtale.load(folder, bits=8, compute="float", kv_dtype="int8-keys").logits(ids)
    assert 0 < np.abs(keys - exact).mean() < np.abs(rounded - exact).mean()


@needs_keys
def test_bits_do_not_depend_on_how_tokens_come(folder: Path) -> None:
    engine, ids = qtale.load(folder, bits=4), ids_of(600)
    whole = engine.logits(ids)
    np.testing.assert_array_equal(engine.logits(ids[:200]), whole[:200])
    prompts = [ids[:40], ids[40:43], ids[100:300]]
    together = engine.generate(prompts, max_new_tokens=20)
    alone = [engine.generate([prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert [each.tokens for each in together] == [each.tokens for each in alone]


@needs_keys
def test_they_take_less_memory(folder: Path) -> None:
    held = {}
    for kind in ("float16", "int8-keys"):
        engine = qtale.load(folder, bits=4, kv_dtype=kind)
        engine.logits(ids_of(320))
        held[kind] = engine.report.kv_bytes[0]
    assert held["int8-keys"] / held["float16"] == (3 * 32 + 4) / (4 * 32)


def test_they_are_refused_where_they_are_not(folder: Path, tmp_path: Path) -> None:
    odd = save_model(make_model("llama", hidden_size=96).half(), tmp_path / "odd", tokenizer=False)
    with pytest.raises(InputError, match=r"'int8-keys' needs .* head_dim is 24; use 'float16'"):
        qtale.load(odd, bits=4, kv_dtype="int8-keys")
    before = _core.cpu_isa()
    _core.set_cpu_isa("generic")
    try:
        with pytest.raises(InputError, match="kernels in use are generic"):
            qtale.load(folder, bits=4, kv_dtype="int8-keys")
        assert kv_dtype(qtale.load(folder, bits=4)) == "float16"
    finally:
        _core.set_cpu_isa(before)
