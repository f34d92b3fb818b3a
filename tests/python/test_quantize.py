"""`qtale.quantize`: from dense folders, tiny random ones and a real one, to packed folders; nothing is half written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qtale
from pack_quantized_oracle import read_packed
from qtale import QuantSpec
from qtale.checkpoint.folder import open_folder
from qtale.checkpoint.index import INDEX_FILE
from qtale.format import packed_modules, read_module
from qtale.ptq.pipeline import quantize
from qtale.ptq.worklist import PROCESS_BYTES
from tiny_models import LAYER, files_in, make_tiny, run_python

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 11 layers in float16, several shards, with an untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(3)
    config = LlamaConfig(**SIZES, num_hidden_layers=11, vocab_size=128, tie_word_embeddings=False)
    LlamaForCausalLM(config).half().save_pretrained(path, max_shard_size="200KB")
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("hi")
    (path / "pytorch_model.bin").write_bytes(b"not to be copied")
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """One hand-made decoder block in float32 in one file."""
    return make_tiny(tmp_path / "tiny")


def round_to_nearest(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> torch.Tensor:
    """The same rounding in plain torch, float32: an oracle that shares no code with the core."""
    rows = weight.float().reshape(weight.shape[0], -1, group or weight.shape[1])
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = rows.amin(-1, keepdim=True).clamp(max=0), rows.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        scale = torch.maximum(-least, most) / ((high - low) / 2)
        zero = torch.zeros_like(scale)
    else:
        scale = (most - least) / (high - low)
    scale = scale.to(weight.dtype).float()
    if not symmetric:
        zero = (low - (least / scale).round()).clamp(low, high)
    codes = ((rows / scale).round() + zero).clamp(low, high)
    restored: torch.Tensor = ((codes - zero) * scale).reshape(weight.shape)
    return restored


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "size"), [("auto", {64: 64, 96: 32}), (32, {64: 32, 96: 32}), ("channel", {})])
def test_weights_are_those_of_an_independent_rounding(
    tiny: Path, tmp_path: Path, bits: int, group: int | str, size: dict[int, int], symmetric: bool
) -> None:
    report = quantize(tiny, tmp_path / "out", QuantSpec(bits, group, symmetric), progress=False)
    dense, packed = load_file(tiny / "model.safetensors"), read_packed(tmp_path / "out")
    assert {row.name for row in report.layers} == packed.keys()
    assert len(packed) == 7
    for row in report.layers:
        weight = dense[f"{row.name}.weight"]
        assert row.group_size == size.get(weight.shape[1], 0)
        expected = round_to_nearest(weight, bits, row.group_size, symmetric)
        got = torch.tensor(packed[row.name].dequantized())
        # Where a weight lies halfway between two codes, either is right: the largest of a symmetric group does.
        tie = (got - expected).abs() > 1e-5
        torch.testing.assert_close((got - weight)[tie].abs(), (expected - weight)[tie].abs(), rtol=1e-4, atol=1e-6)
        assert tie.float().mean() < 0.02
        error = (torch.linalg.norm(got - weight) / torch.linalg.norm(weight)).item()
        assert row.error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.62), (3, 0.26), (4, 0.12), (8, 0.008)])
def test_the_error_of_gaussian_weights_in_groups_of_64_is_bounded(
    tiny: Path, tmp_path: Path, bits: int, bound: float
) -> None:
    report = quantize(tiny, tmp_path / "out", QuantSpec(bits), progress=False)
    errors = [row.error for row in report.layers if row.error is not None]
    assert len(errors) == 7
    assert bound / 2 < max(errors) < bound


def test_a_sharded_folder_keeps_its_shards_and_everything_dense(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = qtale.quantize(sharded, out, QuantSpec(4), progress=False)
    before, after = open_folder(sharded), open_folder(out)
    assert len(before.shards) > 3
    assert [s.path.name for s in after.shards] == [s.path.name for s in before.shards]
    assert len(report.layers) == 77
    assert [row.name for row in report.layers[::7]] == [f"model.layers.{i}.mlp.down_proj" for i in range(11)]
    quantized = {f"{row.name}.weight" for row in report.layers}
    for name in before.tensors.keys() - quantized:
        assert torch.equal(after.torch(name), before.torch(name)), name
    assert not quantized & after.tensors.keys()
    assert report.bytes_before == before.nbytes
    assert report.bytes_after == after.nbytes == json.loads((out / INDEX_FILE).read_text())["metadata"]["total_size"]
    for name in quantized:
        packed = name.removesuffix("weight") + "weight_packed"
        assert after.shard_of(packed).path.name == before.shard_of(name).path.name
    files = {path.name for path in out.iterdir()}
    assert files == {path.name for path in sharded.iterdir()} - {"pytorch_model.bin"}


def test_the_config_changes_only_by_its_quantization(sharded: Path, tmp_path: Path) -> None:
    qtale.quantize(sharded, tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    added = config.pop("quantization_config")
    assert config == json.loads((sharded / "config.json").read_text())
    assert added["ignore"] == ["lm_head"]
    targets = [name for group in added["config_groups"].values() for name in group["targets"]]
    assert len(targets) == len(set(targets)) == 77
    assert not any("*" in name or name.startswith("re:") for name in targets)


def test_a_real_model_at_eight_bits_predicts_as_before(qtale_data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = qtale_data / "models" / "stories260K"
    qtale.quantize(source, tmp_path / "w8", QuantSpec(8, "channel"), progress=False)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    restored = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for module, matrix in read_packed(tmp_path / "w8").items():
            restored.get_submodule(module).weight.copy_(torch.tensor(matrix.dequantized()))
        ids = torch.tensor([[1, 403, 407, 261, 378, 432, 383, 360, 421, 295]])
        expected, exact = restored(ids).logits, dense(ids).logits
        assert torch.equal(expected.argmax(-1), exact.argmax(-1))
        assert not torch.equal(expected, exact)
        pytest.importorskip("compressed_tensors", reason="transformers needs it to open packed folders")
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "w8", dtype=torch.float32).eval()
        # Its 172 columns are no multiple of any group nor of a packed word at 4 bits.
        torch.testing.assert_close(opened(ids).logits, expected)


def test_overrides_give_layers_specs_of_their_own(tiny: Path, tmp_path: Path) -> None:
    overrides = {f"{LAYER}.mlp.down_proj": QuantSpec(8, "channel"), f"{LAYER}.self_attn.o_proj": None}
    report = quantize(tiny, tmp_path / "out", QuantSpec(3), overrides=overrides, progress=False)
    bits = {row.name.rpartition(".")[2]: row.num_bits for row in report.layers}
    assert bits == dict.fromkeys(["gate_proj", "up_proj", "q_proj", "k_proj", "v_proj"], 3) | {"down_proj": 8}
    assert report.left_dense == (f"{LAYER}.self_attn.o_proj",)
    folder = open_folder(tmp_path / "out")
    assert f"{LAYER}.self_attn.o_proj.weight" in folder.tensors
    assert folder.config["quantization_config"]["ignore"] == ["lm_head", f"{LAYER}.self_attn.o_proj"]
    module = packed_modules(folder)[f"{LAYER}.mlp.down_proj"]
    codes, scale, zero_point = read_module(folder, module)
    assert (tuple(codes.shape), tuple(scale.shape), zero_point) == ((64, 96), (64, 1), None)


def test_unknown_matrices_stay_dense_and_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_tiny(tmp_path / "tiny", **{f"{LAYER}.mlp.gate.weight": torch.randn(4, 64)})
    report = quantize(model, tmp_path / "out", progress=False)
    assert report.left_dense == (f"{LAYER}.mlp.gate",)
    assert f"{LAYER}.mlp.gate" in caplog.text
    assert f"{LAYER}.mlp.gate" in open_folder(tmp_path / "out").config["quantization_config"]["ignore"]


def test_a_dry_run_tells_exact_sizes_without_torch_and_writes_nothing(sharded: Path, tmp_path: Path) -> None:
    code = (
        "import sys, json, qtale\n"
        f"report = qtale.quantize({str(sharded)!r}, None, qtale.QuantSpec(3), dry_run=True)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(json.dumps(report.to_json()))\n"
    )
    planned = json.loads(run_python(code, tmp_path))
    assert files_in(tmp_path) == []
    report = quantize(sharded, tmp_path / "out", QuantSpec(3), progress=False)
    for key in ("bytes_before", "bytes_after", "parameters", "bits_per_weight", "bits_per_weight_quantized"):
        assert planned[key] == report.to_json()[key], key
    assert planned["dry_run"]
    assert planned["layers"][0]["error"] is None
    assert str(report).startswith(f"quantized 77 layers of {sharded}")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_that_of_the_largest_matrix_not_of_the_model(tmp_path: Path) -> None:
    embedding, matrix = torch.zeros(2**17, 512), torch.randn(2048, 4096)
    shapes = {f"model.layers.{i}.mlp.down_proj.weight": matrix.clone() for i in range(3)}
    model = make_tiny(tmp_path / "m", **shapes, **{"model.embed_tokens.weight": embedding})
    code = (
        "import re, pathlib, torch, qtale, qtale.torch_ops\n"
        # Unlike ru_maxrss, this does not begin at the parent's size.
        "status = pathlib.Path('/proc/self/status')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text()).group(1)) * 1024\n"
        "start = peak()\n"
        f"report = qtale.quantize({str(model)!r}, {str(tmp_path / 'out')!r}, qtale.QuantSpec(8), progress=False)\n"
        "print(peak() - start, report.peak_bytes, report.bytes_before)\n"
    )
    grown, estimate, model_bytes = map(int, run_python(code, tmp_path).split())
    assert model_bytes > 300 << 20
    # The matrix alone has 32 MiB.
    assert 32 << 20 < grown < estimate - PROCESS_BYTES + (48 << 20) < 160 << 20
