"""Folders of mixed bits written by a plan: they hold what the plan says and open in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import qtale
from pack_quantized_oracle import read_packed
from plan_samples import MIXED, PARTS, make_plan, save_model
from qtale import QuantSpec
from qtale.cli.main import main
from qtale.errors import InputError, UnsupportedError
from qtale.planner import Options, Plan
from tiny_models import files_in

INPUT_IDS = torch.arange(1, 17).reshape(1, 16)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "dense", dtype=torch.float32)


def mixed_plan(model: Path, **options: Any) -> Plan:
    return make_plan(model, 8, MIXED, 16, 2, **options)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(INPUT_IDS).logits
    return logits


@pytest.mark.parametrize(("group_size", "head"), [(32, 16), ("channel", 8)])
def test_a_mixed_folder_opens_in_plain_transformers(
    dense: Path, tmp_path: Path, group_size: int | str, head: int
) -> None:
    pytest.importorskip("compressed_tensors", reason="transformers needs it to open packed folders")
    plan = mixed_plan(dense, group_size=group_size, head=head)
    report = qtale.quantize(dense, tmp_path / "out", plan=plan, progress=False)
    packed = read_packed(tmp_path / "out")
    assert {row.name: row.num_bits for row in report.layers} == {
        name: plan.bits_of(name) for name in packed if plan.spec_of(name)
    }
    assert ("lm_head" in packed) == (head == 8)
    assert len(packed) == 7 + 6 + 7 + (head == 8)
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    expected = LlamaForCausalLM.from_pretrained(dense, dtype="auto")
    with torch.no_grad():
        for module, matrix in packed.items():
            expected.get_submodule(module).weight.copy_(torch.tensor(matrix.dequantized()))
    logits = logits_of(expected)
    torch.testing.assert_close(logits_of(opened), logits)
    assert not torch.allclose(logits, logits_of(LlamaForCausalLM.from_pretrained(dense, dtype="auto")), atol=1e-3)
    own = qtale.load_torch(tmp_path / "out", compute="float")
    torch.testing.assert_close(logits_of(own), logits, rtol=1e-3, atol=1e-4)
    assert own.model.layers[1].mlp.down_proj.spec.num_bits == 8
    assert isinstance(own.model.layers[2].mlp.down_proj, torch.nn.Linear)


def test_a_paper_plan_is_written_per_channel(dense: Path, tmp_path: Path) -> None:
    plan = qtale.plan(dense, bits=6, options=Options(mode="paper"))
    report = qtale.quantize(dense, tmp_path / "out", plan=plan, progress=False)
    assert {row.group_size for row in report.layers} == {0}
    assert sorted(row.num_bits for row in report.layers) == [4] * 14 + [8] * 14


def test_plans_that_do_not_fit_are_refused_before_anything_is_written(dense: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", tied=True, seed=8)
    with pytest.raises(InputError, match="plan: was made for another model"):
        qtale.quantize(other, tmp_path / "out", plan=mixed_plan(dense))
    with pytest.raises(UnsupportedError, match="its head is the embedding"):
        qtale.quantize(other, tmp_path / "out", plan=mixed_plan(other, head=8))
    with pytest.raises(InputError, match="a plan says what every layer gets"):
        qtale.quantize(dense, tmp_path / "out", QuantSpec(4), plan=mixed_plan(dense))
    with pytest.raises(InputError, match="nothing to quantize"):
        qtale.quantize(dense, tmp_path / "out", plan=qtale.plan(dense, "1GiB"))
    assert files_in(tmp_path) == ["other"]


def test_the_command_takes_a_plan_file(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "out"
    mixed_plan(dense, head=4).write(file)
    assert main(["quantize", str(dense), "--plan", str(file), "-o", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted({row["num_bits"] for row in report["layers"]}) == [2, 3, 4, 8]
    assert json.loads((out / "config.json").read_text())["quantization_config"]["ignore"] == [
        "model.layers.1.self_attn.o_proj",
        *(f"model.layers.2.{part}" for part in sorted(PARTS)),
    ]
    for extra in (["--bits", "4"], ["--group-size", "64"], ["--symmetric"], ["--asymmetric"]):
        assert main(["quantize", str(dense), "--plan", str(file), "--dry-run", *extra]) == 1
        assert "--plan says bits, groups and symmetry" in capsys.readouterr().err
    assert main(["quantize", str(dense), "--bits", "0", "--dry-run"]) == 1
    assert "num_bits 0 is not supported" in capsys.readouterr().err


def test_a_hand_edited_plan_is_refused_with_the_place(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = mixed_plan(dense).to_json()
    value["layers"][3] = {"layer": 9, "num_bits": 4}
    (tmp_path / "plan.json").write_text(json.dumps(value))
    assert main(["quantize", str(dense), "--plan", str(tmp_path / "plan.json"), "--dry-run"]) == 1
    assert "names layer 9, but the model has layers 0 to 3" in capsys.readouterr().err
    value["layers"][3] = {"layer": 3, "modules": {**MIXED, "mlp.gate": 4}}
    (tmp_path / "plan.json").write_text(json.dumps(value))
    assert main(["quantize", str(dense), "--plan", str(tmp_path / "plan.json"), "--dry-run"]) == 1
    assert "names module 'mlp.gate' in layer 3, which the model does not have" in capsys.readouterr().err
