"""`qtale.inspect`: dense and quantized folders from their headers, as a folded table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import qtale
from qtale.cli.main import main
from qtale.errors import CheckpointError
from qtale.report.text import Row, fold, human_bytes, ranges
from tiny_models import run_python

SAMPLES = Path(__file__).parent / "samples" / "llmcompressor"


@pytest.fixture(scope="module")
def stories(qtale_data: Path) -> Path:
    return qtale_data / "models" / "stories260K"


def test_a_dense_folder(stories: Path) -> None:
    report = qtale.inspect(stories)
    assert (report.parameters, report.bytes, report.bits_per_weight) == (260_032, 1_040_128, 32.0)
    assert (report.blocks, report.dtype, report.tied_embeddings, report.shards) == (5, "float32", True, 1)
    assert report.bits_per_weight_quantized is None
    assert report.bytes_quantized == 0
    assert {row.role for row in report.layers} == {"linear", "embedding", "norm"}
    assert report.layers[0].name == "model.embed_tokens.weight"
    assert report.layers[-1].name == "model.norm.weight"


def test_a_quantized_folder_counts_scales_and_zero_points(stories: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qtale.quantize(stories, out, qtale.QuantSpec(4, symmetric=False), progress=False)
    report = qtale.inspect(out)
    assert report.parameters == 260_032
    size = (out / "model.safetensors").stat().st_size
    assert report.bytes < size < report.bytes + 20_000
    row = next(row for row in report.layers if row.name == "model.layers.0.mlp.up_proj")
    assert (row.shape, row.num_bits, row.group_size, row.symmetric, row.dtype) == ((172, 64), 4, 64, False, "F32")
    # Codes, one float32 scale a row, the shape, and 172 zero points of 4 bits in one column.
    assert row.bytes == 172 * 64 // 2 + 172 * 4 + 16 + 22 * 4
    assert sum(row.quantized for row in report.layers) == 35
    assert not any("weight_" in row.name for row in report.layers)


@pytest.mark.parametrize(
    ("sample", "specs"),
    [
        ("w4-g64", {(4, 64, True)}),
        ("w4-g128-asymmetric", {(4, 128, False)}),
        ("w8-channel", {(8, 0, True)}),
        ("mixed", {(4, 64, True), (8, 0, True)}),
    ],
)
def test_folders_of_llm_compressor(sample: str, specs: set[tuple[int, int, bool]]) -> None:
    report = qtale.inspect(SAMPLES / sample)
    found = {(row.num_bits, row.group_size, row.symmetric) for row in report.layers if row.quantized}
    assert found == specs
    assert sum(row.quantized for row in report.layers) == 7


def test_the_table_folds_equal_layers_and_keeps_different_ones_apart(stories: Path, tmp_path: Path) -> None:
    eight = {f"model.layers.{i}.mlp.down_proj": qtale.QuantSpec(8, "channel") for i in (0, 1, 4)}
    qtale.quantize(stories, tmp_path / "out", overrides=eight, progress=False)
    report = qtale.inspect(tmp_path / "out")
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert lines[0].endswith("LlamaForCausalLM, 5 blocks, float32, embedding and head tied")
    assert "model.layers.{0-1,4}.mlp.down_proj 3 64 x 172 8 channel 33.0 KiB" in lines
    assert "model.layers.{2-3}.mlp.down_proj 2 64 x 172 4 channel 11.5 KiB" in lines
    assert lines[-1].startswith("260,032 parameters in 2")
    assert len(report.text(every_layer=True).splitlines()) == len(report.layers) + 6


def test_headers_only_and_no_torch(stories: Path, tmp_path: Path) -> None:
    code = f"import sys, qtale; print(qtale.inspect({str(stories)!r})); assert 'torch' not in sys.modules"
    assert "260,032 parameters" in run_python(code, tmp_path)


def test_json_round_trips(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(stories), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    report = qtale.inspect(stories)
    assert shown == json.loads(json.dumps(report.to_json()))
    assert len(shown["layers"]) == len(report.layers) == 47
    assert main(["inspect", str(stories), "--all"]) == 0
    assert capsys.readouterr().out == report.text(every_layer=True) + "\n"


@pytest.mark.parametrize(
    ("config", "head", "tied"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, False, True),
        ({"architectures": ["LlamaForCausalLM"]}, True, False),
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}, True, True),
        ({"architectures": ["BertModel"]}, False, False),
    ],
)
def test_tied_embeddings(tmp_path: Path, config: dict[str, object], head: bool, tied: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": torch.zeros(4, 2)}
    save_file(tensors | ({"lm_head.weight": torch.ones(4, 2)} if head else {}), tmp_path / "model.safetensors")
    assert qtale.inspect(tmp_path).tied_embeddings is tied


def test_an_empty_folder_of_tensors_is_described(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({}, tmp_path / "model.safetensors")
    report = qtale.inspect(tmp_path)
    assert (report.parameters, report.bits_per_weight, report.dtype) == (0, None, "unknown")
    assert "0 parameters" in str(report)


def test_a_broken_folder_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="truncated"):
        qtale.inspect(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"qtale: error: {tmp_path}/model.safetensors: is truncated")


def test_experts_fold_before_layers() -> None:
    rows = [Row(f"m.{i}.experts.{j}.up", ("2 x 2",), (8,)) for i in range(3) for j in range(4)]
    assert fold(rows) == [Row("m.{0-2}.experts.{0-3}.up", ("2 x 2",), (96,), 12)]
    rows[5] = Row("m.1.experts.1.up", ("3 x 3",), (8,))
    assert {row.name: row.count for row in fold(rows)} == {
        "m.{0,2}.experts.{0-3}.up": 8,
        "m.1.experts.{0,2-3}.up": 3,
        "m.1.experts.1.up": 1,
    }


@given(st.lists(st.integers(0, 40), unique=True, min_size=1).map(sorted))
def test_ranges_name_every_number_once(numbers: list[int]) -> None:
    parts = [part.split("-") for part in ranges(numbers).split(",")]
    assert [n for part in parts for n in range(int(part[0]), int(part[-1]) + 1)] == numbers


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**51, "2048.0 TiB")]
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text
