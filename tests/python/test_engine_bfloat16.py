"""Dense models that compute in bfloat16 keep their matrices in it, whatever the folder holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import qtale
from engine_samples import ids_of, make_model, save_model
from qtale import QuantSpec, _core
from qtale.checkpoint.folder import ModelFolder, open_folder
from qtale.engine.arena import Arena, memory_of
from qtale.engine.layout import WeightOptions, plan_layout
from qtale.engine.regions import Block, Layout
from qtale.engine.spec import read_spec
from qtale.engine.weights import read_weights
from qtale.errors import InputError

LAYER = "model.layers.1"

needs_bfloat16 = pytest.mark.skipif(not _core.has_bfloat16(), reason="this CPU has no products of bfloat16 numbers")


def planned(folder: ModelFolder, options: WeightOptions, compute: str) -> Layout:
    return plan_layout(folder, read_spec(folder.config, "folder"), options, compute)


def rounded(values: np.ndarray) -> np.ndarray:
    out = np.empty(values.shape, dtype=np.uint16)
    _core.round_weights(memory_of(values, "float32"), memory_of(out, "bfloat16"))
    return out


def in_rows(bits: np.ndarray, block: Block) -> np.ndarray:
    """The numbers of a matrix as [rows, cols], out of tiles where it lies in such."""
    if len(block.dense_shape) == 2:
        return bits.reshape(block.dense_shape)
    down, across, _, _ = block.dense_shape
    pairs = bits.reshape(down, across, 16, 16, 2)
    return pairs.transpose(0, 3, 1, 2, 4).reshape(block.rows, block.cols)


@needs_bfloat16
def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    random = np.random.default_rng(3).integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 3.4028235e38, -3.4028235e38, 1.00390625, 1.01171875], np.float32)
    values = np.concatenate([special, random])
    values = values[(np.abs(values) >= np.finfo(np.float32).tiny) | (values == 0)]
    values = values[: values.size // 50 * 50].reshape(-1, 50)
    expected = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (rounded(values) == expected).all()


@needs_bfloat16
def test_what_is_no_number_stays_so_and_tiny_ones_are_zero() -> None:
    values = np.array([[np.nan, -np.nan, 1e-39, -1e-39, -1e-45, 1.0]], dtype=np.float32)
    found = rounded(values)[0]
    assert np.isnan((found[:2].astype(np.uint32) << 16).view(np.float32)).all()
    assert found[2:].tolist() == [0, 0x8000, 0x8000, 0x3F80]


@needs_bfloat16
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrices_but_the_embedding_are_kept_in_bfloat16(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = open_folder(save_model(make_model("llama", tie_word_embeddings=False).to(dtype), tmp_path / "m"))
    layout = planned(folder, WeightOptions(), "bfloat16")
    arena = Arena(layout.nbytes)
    read_weights(folder, layout, arena, progress=False)

    def held(name: str) -> np.ndarray:
        block = layout.blocks[name]
        return arena.view(block.offset, block.nbytes)

    gate_up = [torch.from_numpy(folder.raw(f"{LAYER}.mlp.{part}_proj.weight").copy()) for part in ("gate", "up")]
    expected = torch.cat([part.view(dtype) for part in gate_up]).bfloat16().view(torch.int16).numpy().view(np.uint16)
    block = layout.blocks["layers.1.gate_up.0"]
    assert (in_rows(held(block.name).view(np.uint16), block).ravel() == expected).all()
    assert block.sources[0].tiled == (_core.has_tiles() and block.cols % 32 == 0)
    assert layout.sources("head")[0].dtype == "bfloat16"
    assert (held("embedding") == folder.raw("model.embed_tokens.weight")).all()
    assert layout.bits == (16,)


@needs_bfloat16
def test_logits_are_those_of_rounded_weights(tmp_path: Path) -> None:
    model = make_model("llama", hidden_size=128, head_dim=32)
    stored = save_model(model, tmp_path / "float32", tokenizer=False)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
                module.weight.copy_(module.weight.bfloat16().float())
    rounded = save_model(model, tmp_path / "rounded", tokenizer=False)
    mine, theirs = (qtale.load(path, compute="bfloat16").logits(ids_of(60)) for path in (stored, rounded))
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.skipif(not _core.has_tiles(), reason="this CPU has no tiles")
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 64, "intermediate_size": 96},
        {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 1},  # keys are no whole tiles
        {"hidden_size": 64, "intermediate_size": 104, "mlp_bias": True},
    ],
)
def test_tiles_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, object]) -> None:
    path = save_model(make_model("llama", **sizes), tmp_path / "model", tokenizer=False)
    kept = {"cache": tmp_path / "cache"}
    tiled = [qtale.load(path, compute="bfloat16", **kept) for _ in range(2)]
    assert [engine.load_report.from_cache for engine in tiled] == [False, True]
    monkeypatch.setattr("qtale.engine.layout._core.has_tiles", lambda: False)
    rows = qtale.load(path, compute="bfloat16", **kept)
    assert not rows.load_report.from_cache
    for count in (1, 20, 100):
        expected = rows.logits(ids_of(count))
        for engine in tiled:
            np.testing.assert_array_equal(engine.logits(ids_of(count)), expected)


@needs_bfloat16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_numbers_of_inputs_are_refused_at_load(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model("llama", intermediate_size=97).to(dtype)
    with pytest.raises(InputError, match=r"down_proj takes 97 inputs.*compute 'float'"):
        qtale.load(save_model(model, tmp_path / "model", tokenizer=False), compute="bfloat16")


@needs_bfloat16
def test_a_matrix_is_converted_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(make_model("llama"), tmp_path / "model", tokenizer=False)
    expected = qtale.load(path, compute="bfloat16").logits(ids_of(40))
    monkeypatch.setattr("qtale.engine.regions._CONVERTED_BYTES", 5000)
    layout = planned(open_folder(path), WeightOptions(), "bfloat16")
    assert 0 < layout.workspace <= 16 * 96 * 4
    np.testing.assert_array_equal(qtale.load(path, compute="bfloat16").logits(ids_of(40)), expected)


@needs_bfloat16
def test_a_change_of_bits_takes_what_is_there_as_it_is(tmp_path: Path) -> None:
    path = save_model(make_model("llama"), tmp_path / "model", tokenizer=False)
    folder = open_folder(path)
    engine = qtale.load(path, compute="bfloat16")
    with engine.change() as change:
        assert change.moves(folder, {}) == []
        spec = QuantSpec(8, 32).resolve(f"{LAYER}.mlp.down_proj", 64)
        assert [move.region for move in change.moves(folder, {f"{LAYER}.mlp.down_proj": spec})] == ["layers.1.down"]


def test_quantized_matrices_are_read_as_for_other_ways_to_compute(tmp_path: Path) -> None:
    folder = open_folder(save_model(make_model("llama"), tmp_path / "model", tokenizer=False))
    one, other = (planned(folder, WeightOptions(QuantSpec(4, 32)), compute) for compute in ("bfloat16", "int8"))
    kinds = [source.kind for source in one.sources("layers.1.down")]
    assert kinds == [source.kind for source in other.sources("layers.1.down")]
    assert kinds[0][:2] == ("float32", 4)
