"""The loader: what lies in the arena, the cache of it, and what is refused before anything is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qtale
from engine_samples import MEMBERS, ids_of, make_model, save_model
from qtale import QuantSpec, _core, ops
from qtale.checkpoint.folder import ModelFolder, open_folder
from qtale.engine.arena import Arena, memory_of
from qtale.engine.cache import PackedCache
from qtale.engine.layout import WeightOptions, plan_layout
from qtale.engine.regions import Layout
from qtale.engine.spec import read_spec
from qtale.engine.weights import check_memory, read_weights
from qtale.errors import CheckpointError, Error, InputError, UnsupportedError
from qtale.format import packed_modules, read_module
from tiny_models import run_python

LAYER = "model.layers.1"


def loaded(folder: ModelFolder, **options: Any) -> tuple[Layout, Arena]:
    layout = plan_layout(folder, read_spec(folder.config, "folder"), WeightOptions(**options))
    arena = Arena(layout.nbytes)
    read_weights(folder, layout, arena, progress=False)
    return layout, arena


def block(layout: Layout, arena: Arena, name: str) -> Any:
    found = layout.blocks[name]
    return arena.view(found.offset, found.nbytes)


def saved(tmp_path: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    kind, changes = MEMBERS[name]
    return save_model(make_model(kind, **changes).to(dtype), tmp_path / name, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_matrices_keep_their_bytes_side_by_side(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = open_folder(saved(tmp_path, "llama_biases", dtype, max_shard_size="50KB"))
    assert len(folder.shards) > 1
    layout, arena = loaded(folder)
    parts = [folder.raw(f"{LAYER}.self_attn.{part}_proj.weight") for part in "qkv"]
    assert (block(layout, arena, "layers.1.qkv.0") == np.concatenate(parts)).all()
    biases = [folder.numpy(f"{LAYER}.mlp.{part}_proj.bias").astype(np.float32) for part in ("gate", "up")]
    assert (block(layout, arena, "layers.1.gate_up.0.bias").view(np.float32) == np.concatenate(biases)).all()
    norm = folder.numpy(f"{LAYER}.input_layernorm.weight").astype(np.float32)
    assert (block(layout, arena, "layers.1.input_norm").view(np.float32) == norm).all()
    assert (block(layout, arena, "embedding") == folder.raw("model.embed_tokens.weight")).all()


def unpacked(layout: Layout, arena: Arena, name: str) -> tuple[Any, Any, Any]:
    codes, scale, zero = ops.unprepack(torch.from_numpy(block(layout, arena, name).copy()))
    return codes, scale, zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False), (8, True), (2, False)])
def test_packed_matrices_hold_the_codes_of_the_folder(
    tmp_path: Path, dtype: torch.dtype, bits: int, symmetric: bool
) -> None:
    dense = saved(tmp_path, dtype=dtype)
    qtale.quantize(dense, tmp_path / "packed", spec=QuantSpec(bits, 32, symmetric), progress=False)
    folder = open_folder(tmp_path / "packed")
    modules = packed_modules(folder)
    layout, arena = loaded(folder)
    for name, parts in {"qkv": ["q", "k", "v"], "gate_up": ["gate", "up"], "down": ["down"]}.items():
        at = f"{LAYER}.self_attn" if name == "qkv" else f"{LAYER}.mlp"
        read = [read_module(folder, modules[f"{at}.{part}_proj"]) for part in parts]
        found = unpacked(layout, arena, f"layers.1.{name}.0")
        for mine, theirs in zip(found, zip(*read, strict=True), strict=True):
            assert (mine is None) == (theirs[0] is None)
            assert mine is None or torch.equal(mine, torch.cat(theirs))


def test_rounding_at_load_gives_what_quantize_writes(tmp_path: Path) -> None:
    dense = saved(tmp_path, dtype=torch.bfloat16)
    qtale.quantize(dense, tmp_path / "packed", spec=QuantSpec(4, 32), progress=False)
    one, other = loaded(open_folder(tmp_path / "packed")), loaded(open_folder(dense), quantize=QuantSpec(4, 32))
    assert one[0].nbytes == other[0].nbytes
    assert (one[1].bytes == other[1].bytes).all()


def test_parts_of_different_bits_are_matrices_of_their_own(tmp_path: Path) -> None:
    overrides = {f"{LAYER}.self_attn.o_proj": None, "model.layers.0.mlp.down_proj": QuantSpec(8, "channel")}
    out = tmp_path / "packed"
    qtale.quantize(saved(tmp_path), out, spec=QuantSpec(4, 32), overrides=overrides, progress=False)
    layout, _ = loaded(open_folder(out))
    assert layout.blocks["layers.1.o.0"].sources[0].spec is None
    down = layout.blocks["layers.0.down.0"].sources[0].spec
    assert down is not None
    assert (down.num_bits, down.group_size) == (8, 0)
    engine = qtale.load(out, compute="float")
    assert "llama, 3 layers of 64, context 256, weights of 4, 8, 32 bits in" in repr(engine)
    assert np.isfinite(engine.logits(ids_of(5))).all()


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_head_can_be_rounded_by_itself(tmp_path: Path, name: str, bits: int) -> None:
    folder = open_folder(saved(tmp_path, name))
    layout, arena = loaded(folder, head_bits=bits)
    tensor = "model.embed_tokens.weight" if name == "llama_tied" else "lm_head.weight"
    expected = ops.quantize(torch.from_numpy(folder.numpy(tensor)), bits, 64)
    codes, scale, _ = unpacked(layout, arena, "head.0")
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])
    assert (block(layout, arena, "embedding") == folder.raw("model.embed_tokens.weight")).all()


def test_slices_begin_at_64_bytes_and_do_not_overlap(tmp_path: Path) -> None:
    layout, arena = loaded(open_folder(saved(tmp_path, "qwen3_types")), quantize=QuantSpec(3))
    end = 0
    for each in layout.blocks.values():
        assert each.offset % 64 == 0
        assert each.offset >= end
        end = each.offset + each.nbytes
    assert end <= layout.nbytes
    assert arena.bytes.ctypes.data % (2 << 20) == 0


@pytest.fixture(params=[None, 1, 3])
def stretches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache in one stretch, and in many that one or several threads read."""
    before = _core.num_threads()
    if request.param is not None:
        monkeypatch.setattr("qtale.engine.cache._PIECE", 1 << 10)
        monkeypatch.setattr("qtale.engine.cache._STRETCH", 3 << 10)
        _core.set_num_threads(request.param)
    yield
    _core.set_num_threads(before)


@pytest.mark.usefixtures("stretches")
def test_a_cache_gives_the_same_memory_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = open_folder(saved(tmp_path))
    layout, arena = loaded(folder, quantize=QuantSpec(4, 32))
    cache = PackedCache(tmp_path / "cache", folder, layout)
    assert not cache.read(Arena(layout.nbytes))
    cache.write(arena)
    again = Arena(layout.nbytes)
    assert PackedCache(tmp_path / "cache", folder, layout).read(again)
    assert (again.bytes == arena.bytes).all()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [cache.path.name]
    assert not caplog.records


@pytest.mark.usefixtures("stretches")
def test_a_broken_cache_is_ignored_and_written_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path)
    options: dict[str, Any] = {"bits": 4, "group_size": 32, "cache": tmp_path / "cache"}
    expected = qtale.load(path, **options).logits(ids_of(7))
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    for place in (len(whole) // 2, len(whole) - 1, 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with caplog.at_level(logging.WARNING, "qtale"):
            engine = qtale.load(path, **options)
        assert [record for record in caplog.records if "cache" in record.getMessage()]
        caplog.clear()
        assert not engine.load_report.from_cache
        assert (engine.logits(ids_of(7)) == expected).all()
        assert file.read_bytes() == whole
    file.write_bytes(whole[:-100])
    assert not qtale.load(path, **options).load_report.from_cache
    engine = qtale.load(path, **options)
    assert engine.load_report.from_cache
    assert (engine.logits(ids_of(7)) == expected).all()


def test_other_options_models_and_kernels_have_files_of_their_own(tmp_path: Path) -> None:
    path, cache = saved(tmp_path), tmp_path / "cache"
    qtale.load(path, bits=4, cache=cache)
    assert not qtale.load(path, bits=8, cache=cache).load_report.from_cache
    isa = _core.cpu_isa()
    try:
        _core.set_cpu_isa("generic")
        assert not qtale.load(path, bits=4, cache=cache).load_report.from_cache
    finally:
        _core.set_cpu_isa(isa)
    assert len(list(cache.iterdir())) == 3


def test_a_model_that_changed_takes_the_place_of_what_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, cache = saved(tmp_path), tmp_path / "cache"
    qtale.load(path, bits=4, cache=cache)
    save_model(make_model("llama", seed=1), path)
    with caplog.at_level(logging.WARNING, "qtale"):
        assert not qtale.load(path, bits=4, cache=cache).load_report.from_cache
    assert len(caplog.records) == 1
    assert "another one" in caplog.text
    assert qtale.load(path, bits=4, cache=cache).load_report.from_cache
    assert len(list(cache.iterdir())) == 1
    tensors = load_file(path / "model.safetensors")
    # A number between those that a fingerprint samples.
    tensors["lm_head.weight"].view(-1)[100] += 1
    save_file(tensors, path / "model.safetensors")
    assert not qtale.load(path, bits=4, cache=cache).load_report.from_cache


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cache"):
        qtale.load(saved(tmp_path), cache=tmp_path / "file")


def test_memory_is_compared_with_what_is_free_before_reading(tmp_path: Path) -> None:
    folder = open_folder(saved(tmp_path))
    layout = plan_layout(folder, read_spec(folder.config, "folder"), WeightOptions(QuantSpec(4)))
    check_memory(layout, "folder", lambda: layout.nbytes + layout.workspace)
    check_memory(layout, "folder", lambda: None)
    with pytest.raises(Error, match=r"folder: its weights take .* are free"):
        check_memory(layout, "folder", lambda: layout.nbytes + layout.workspace - 1)


def rewrite(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 2},
        {"vocab_size": 256},
        {"intermediate_size": 64},
        {"num_key_value_heads": 4},
        {"attention_bias": True},
        {"model_type": "qwen3"},
        {"head_dim": 8},
        {"eos_token_id": "x"},
    ],
)
def test_a_config_that_does_not_fit_the_tensors_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = saved(tmp_path)
    (path / "generation_config.json").unlink()
    rewrite(path, **changes)
    with pytest.raises(CheckpointError):
        qtale.load(path)


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    qtale.quantize(path, tmp_path / "packed", spec=QuantSpec(4), progress=False)
    threads = "is not a number of threads; use 1 to 1024, or None"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"compute": "fast"}, "compute 'fast' is not known"),
        ({"kv_dtype": "int8"}, "kv_dtype 'int8' is not known"),
        ({"context": 0}, "context 0 must be a number of tokens"),
        ({"num_threads": 0}, f"num_threads 0 {threads}"),
        ({"num_threads": 1025}, f"num_threads 1025 {threads}"),
        ({"lm_head_bits": 3}, "lm_head_bits 3 is not supported"),
        ({"bits": 5}, "num_bits 5 is not supported"),
        ({"bits": 4, "group_size": 48}, "group_size 48 is not supported"),
    ]
    for options, message in wrong:
        with pytest.raises(InputError, match=message):
            qtale.load(path, **options)
    qtale.load(path, num_threads=1024, progress=False).logits([5])
    with pytest.raises(InputError, match="use 1 to 1024"):
        _core.set_num_threads(1025)
    with pytest.raises(InputError, match="quantized already"):
        qtale.load(tmp_path / "packed", bits=4)


def test_tensors_of_other_dtypes_are_named(tmp_path: Path) -> None:
    path = save_model(make_model("llama").to(torch.float64), tmp_path / "llama")
    with pytest.raises(UnsupportedError, match=r"F64; the engine reads .*\. Use qtale\.load_torch for it\."):
        qtale.load(path)


def test_loading_and_generating_imports_no_torch(tmp_path: Path) -> None:
    path = saved(tmp_path)
    code = (
        f"import sys, qtale; engine = qtale.load({str(path)!r}, bits=4, lm_head_bits=8); "
        "print(len(engine.generate('Hello', 4, ignore_end=True).tokens)); "
        "engine.loglikelihood([('a', 'b')]); engine.perplexity('some text'); "
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'torch', 'transformers', 'lm_eval', 'accelerate', 'datasets'}))"
    )
    assert run_python(code, tmp_path).split() == ["4"]


def test_memory_of_a_slice_is_what_the_core_expects() -> None:
    array = np.zeros((3, 4), dtype=np.uint16)
    assert memory_of(array, "bfloat16") == (array.ctypes.data, "bfloat16", (3, 4), (4, 1), -1)
    assert memory_of(np.zeros(24, np.uint8), "float16", (3, 4))[2:4] == ((3, 4), (4, 1))
