"""load_torch and quantize_model_: folders and arguments that they refuse, and quantizing a model in place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qtale
from eval_samples import tiny_llama
from qtale import QuantSpec
from qtale.errors import CheckpointError, InputError, UnsupportedError
from qtale.integrations.transformers import quantize_model_
from qtale.nn import QLinear

IDS = torch.arange(1, 13).reshape(1, 12)
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "dense")
    qtale.quantize(tmp_path / "dense", tmp_path / "packed", QuantSpec(4, 32), progress=False)
    return tmp_path / "packed"


def change_tensors(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_arguments(packed: Path) -> None:
    with pytest.raises(UnsupportedError, match="device 'cuda' is not supported"):
        qtale.load_torch(packed, device="cuda")
    with pytest.raises(InputError, match="compute 'int4' is not a mode; use 'int8', 'int16' or 'float'"):
        qtale.load_torch(packed, compute="int4")
    for dtype in (torch.float64, "int8"):
        with pytest.raises(InputError, match=r"dtype .* is not supported; use float32, float16, bfloat16"):
            qtale.load_torch(packed, dtype=dtype)
    with pytest.raises(CheckpointError, match="no such"):
        qtale.load_torch(packed / "nothing")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "t5"}, "no causal language model of type 't5'"),
        ({"model_type": "no-such-model"}, "transformers cannot use its config.json"),
        ({"num_attention_heads": 7}, "config.json: .*hidden size .64. is not a multiple"),
        ({"intermediate_size": 128}, r"holds \[(96, 64|64, 96)\], but the model of config.json has"),
        ({"num_hidden_layers": 1}, r"packed tensors do not fit the model: .* has no module 'model.layers.1"),
        ({"vocab_size": 300}, r"weight has shape \[257, 64\], but config.json asks for \[300, 64\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_do_not_fit(packed: Path, changes: dict[str, Any], sentence: str) -> None:
    change_config(packed, **changes)
    with pytest.raises((CheckpointError, UnsupportedError), match=sentence):
        qtale.load_torch(packed)


def test_dense_folders_that_transformers_cannot_load(packed: Path) -> None:
    change_config(packed.parent / "dense", model_type="t5")
    with pytest.raises(UnsupportedError, match="no causal language model of type 't5'"):
        qtale.load_torch(packed.parent / "dense")


def test_missing_and_unknown_tensors(packed: Path) -> None:
    change_tensors(packed, {"model.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"lacks the tensors model.norm.weight"):
        qtale.load_torch(packed)
    change_tensors(packed, {"model.norm.weight": torch.ones(64), "model.extra.weight": torch.ones(3)})
    with pytest.raises(UnsupportedError, match=r"tensor 'model.extra.weight' has no place in .* LlamaForCausalLM"):
        qtale.load_torch(packed)
    change_tensors(packed, {"model.extra.weight": None, f"{DOWN}.weight_scale": None})
    with pytest.raises(CheckpointError, match="weight_scale"):
        qtale.load_torch(packed)


def test_a_bias_that_the_model_has_and_the_folder_lacks(packed: Path) -> None:
    change_config(packed, mlp_bias=True)
    with pytest.raises(CheckpointError, match="bias"):
        qtale.load_torch(packed)


def test_a_truncated_file(packed: Path) -> None:
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        qtale.load_torch(packed)


def test_quantizing_in_place_gives_what_the_folder_gives(packed: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    before = sum(parameter.nbytes for parameter in model.parameters())
    report = quantize_model_(model, QuantSpec(4, 32), progress=False)
    loaded = qtale.load_torch(packed)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    assert type(model.lm_head) is torch.nn.Linear
    inspected = qtale.inspect(packed)
    assert report.modules == tuple(name for name, module in model.named_modules() if isinstance(module, QLinear))
    assert report.bits_per_weight == inspected.bits_per_weight_quantized
    assert (report.bytes_before, report.bytes_after) == (before, inspected.bytes)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(qtale.load_torch(tmp_path / "saved")(IDS).logits, loaded(IDS).logits)


def test_quantizing_in_place_refuses(packed: Path) -> None:
    model = tiny_llama()
    with pytest.raises(InputError, match=r"in_features 64 is not a multiple of group_size 128"):
        quantize_model_(model, QuantSpec(4, 128), progress=False)
    assert not any(isinstance(module, QLinear) for module in model.modules())
    with torch.no_grad():
        model.get_submodule(DOWN).weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=f"{DOWN}: quantize"):
        quantize_model_(model, QuantSpec(4, 32), progress=False)
    with pytest.raises(UnsupportedError, match="Linear has no Linear layers inside decoder blocks"):
        quantize_model_(torch.nn.Linear(4, 4), progress=False)
    with pytest.raises(UnsupportedError, match="no Linear layers"):
        quantize_model_(qtale.load_torch(packed), progress=False)
