"""What `qtale.quantize` refuses, each with a sentence and nothing left on the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qtale import CheckpointError, Error, InputError, QuantSpec, UnsupportedError
from qtale.checkpoint.writer import ShardWriter
from qtale.ptq.pipeline import quantize
from tiny_models import LAYER, files_in, make_tiny


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """One hand-made decoder block in float32 in one file."""
    return make_tiny(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({f"{LAYER}.mlp.down_prj": QuantSpec(8)}, f"no quantizable layer.*near names: {LAYER}.mlp.down_proj"),
        ({"model.embed_tokens": QuantSpec(8)}, "no quantizable layer"),
        ({f"{LAYER}.self_attn.k_proj": QuantSpec(8)}, r"k_proj.*q_proj.*must share one spec|q_proj.*k_proj.*share"),
        ({f"{LAYER}.mlp.up_proj": None}, r"up_proj \(dense\).*gate_proj \(4 bits, groups of 64, symmetric\).*share"),
        ({f"{LAYER}.mlp.down_proj": QuantSpec(4, 64)}, "in_features 96 is not a multiple of group_size 64.*32"),
    ],
)
def test_overrides_that_cannot_be(tiny: Path, tmp_path: Path, overrides: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        quantize(tiny, tmp_path / "out", overrides=overrides, progress=False)
    assert files_in(tmp_path) == ["tiny"]


def test_a_group_that_does_not_divide_is_refused_before_anything_is_written(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{LAYER}.mlp.down_proj: in_features 96 .* divide it: 32"):
        quantize(tiny, tmp_path / "out", QuantSpec(4, 64), progress=False)
    assert files_in(tmp_path) == ["tiny"]


def test_existing_output_quantized_input_and_no_output_are_refused(tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "out", progress=False)
    with pytest.raises(InputError, match="exists already"):
        quantize(tiny, tmp_path / "out", progress=False)
    with pytest.raises(UnsupportedError, match="quantized already"):
        quantize(tmp_path / "out", tmp_path / "again", progress=False)
    with pytest.raises(InputError, match="no output folder"):
        quantize(tiny, None, progress=False)
    assert files_in(tmp_path) == ["out", "tiny"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_weights_name_the_module_and_leave_nothing(tmp_path: Path, value: float) -> None:
    weight = torch.randn(96, 64)
    weight[95, 63] = value
    model = make_tiny(tmp_path / "tiny", **{f"{LAYER}.mlp.up_proj.weight": weight})
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: {LAYER}\.mlp\.up_proj\.weight cannot be quantized"
    ):
        quantize(model, tmp_path / "out", progress=False)
    assert files_in(tmp_path) == ["tiny"]


def test_a_disk_that_fills_up_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = ShardWriter.write

    def fill_up(self: ShardWriter, name: str, value: Any) -> None:
        written.append(name)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, value)

    monkeypatch.setattr(ShardWriter, "write", fill_up)
    with pytest.raises(Error, match="disk became full"):
        quantize(tiny, tmp_path / "out", progress=False)
    assert files_in(tmp_path) == ["tiny"]


def test_too_little_space_is_told_before_writing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(Error, match="has 1000 free; nothing was written"):
        quantize(tiny, tmp_path / "out", progress=False)
    assert files_in(tmp_path) == ["tiny"]


def test_models_that_cannot_be_quantized(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "conv1d")
    (model / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UnsupportedError, match=r"'gpt2' stores its matrices transposed"):
        quantize(model, tmp_path / "out")
    (model / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    save_file({"stage.conv.weight": torch.zeros(2, 2, 3, 3)}, model / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"no Linear weights.*'resnet'"):
        quantize(model, tmp_path / "out")
    integers = make_tiny(tmp_path / "ints", **{f"{LAYER}.mlp.up_proj.weight": torch.zeros(96, 64, dtype=torch.int8)})
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight has dtype I8; quantize takes F32, F16, BF16"):
        quantize(integers, tmp_path / "out")


def test_a_dry_run_still_refuses_an_existing_output(tiny: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        quantize(tiny, tiny, dry_run=True)
