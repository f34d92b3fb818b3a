"""`qtale.deploy` on PyTorch: what runs is what the plan says, and changes of plan touch only what changes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qtale
from plan_samples import MIXED, MODULES, SIZES, deployer, make_plan, save_importance, save_model
from qtale.deployment import Deployment
from qtale.nn import QLinear
from qtale.planner import Options, Plan
from qtale.process import resident_bytes

INPUT_IDS = torch.arange(1, 17).reshape(1, 16)
deploy = deployer("torch", Options(choices=(16, 8, 4, 3), group_size=32, context=32))
# All of the model at 16 bits takes 1.4 MiB with KV cache and workspace, at 3 bits 641 KiB.
BUDGETS = ("2MiB", "1100KiB", "900KiB", "760KiB", "680KiB", "760KiB", "900KiB", "1100KiB")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "biased"
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path, max_shard_size="200KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(INPUT_IDS).logits
    return logits


def text_of(deployment: Deployment) -> list[int]:
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(INPUT_IDS)}
    tokens: list[int] = deployment.generate(INPUT_IDS, **options, pad_token_id=0)[0].tolist()
    return tokens


def bits_of(deployment: Deployment) -> dict[str, int]:
    """Bits by module, told from the modules themselves."""
    found = {name: deployment.model.get_submodule(name) for name in (*MODULES, "lm_head")}
    return {name: layer.spec.num_bits if isinstance(layer, QLinear) else 16 for name, layer in found.items()}


def test_a_model_that_fits_stays_as_it_is_stored(dense: Path) -> None:
    deployment = deploy(dense, "1GiB")
    assert set(bits_of(deployment).values()) == {16}
    assert {layer.num_bits for layer in deployment.plan.layers} == {16}
    assert deployment.report.changes == ()
    assert deployment.report.weights_bytes == deployment.report.stored_bytes == deployment.weights_bytes
    assert deployment.model.dtype == torch.float16
    assert torch.equal(logits_of(deployment.model), logits_of(qtale.load_torch(dense)))
    assert not hasattr(deployment.model.config, "quantization_config")


@pytest.mark.parametrize("compute", ["int8", "int16", "float"])
def test_a_deployed_model_is_bit_for_bit_the_folder_of_its_plan(biased: Path, tmp_path: Path, compute: str) -> None:
    plan = make_plan(biased, 8, MIXED, 16, 2)
    deployment = deploy(biased, plan=plan, compute=compute)
    assert bits_of(deployment) == {**{name: plan.bits_of(name) for name in MODULES}, "lm_head": 16}
    qtale.quantize(biased, tmp_path / "out", plan=plan, progress=False)
    assert torch.equal(logits_of(deployment.model), logits_of(qtale.load_torch(tmp_path / "out", compute=compute)))
    assert deployment.report.budget_bytes is None
    assert deployment.model.lm_head.weight is deployment.model.model.embed_tokens.weight


def test_budgets_are_kept_and_scores_decide(dense: Path, tmp_path: Path) -> None:
    deployment = deploy(dense, "900KiB")
    assert deployment.needed_bytes == deployment.plan.needed_bytes <= 900 << 10
    assert deployment.plan.metric == "none"
    assert deployment.report.budget_source == "given"
    scores = save_importance(tmp_path / "importance.json", dense, {"jaccard": [0.1, 0.9, 0.7, 0.4]})
    by_layer = Options(granularity="layer", choices=(16, 4), group_size=32, context=32)
    found = deploy(dense, "1100KiB", importance=scores, options=by_layer)
    widths = [layer.num_bits for layer in found.plan.layers]
    assert found.plan.metric == "jaccard"
    assert widths[0] == 4
    assert widths[1] == 16
    same = deploy(dense, "1100KiB", importance=qtale.importance.Importance.read(scores), options=by_layer)
    assert same.plan == found.plan


def test_a_change_of_plan_touches_only_what_changes(biased: Path) -> None:
    first, second = make_plan(biased, 8, MIXED, 16, 2), make_plan(biased, 8, 4, 16, 16)
    deployment = deploy(biased, plan=first)
    before = dict(deployment.model.named_modules())
    report = deployment.replan(plan=second)
    after = dict(deployment.model.named_modules())
    changed = {name for name in MODULES if first.bits_of(name) != second.bits_of(name)}
    assert {name for name in before if before[name] is not after[name]} == changed
    assert {change.name for change in report.changes} == changed
    assert {change.name: (change.bits_before, change.bits_after) for change in report.changes} == {
        name: (first.bits_of(name), second.bits_of(name)) for name in changed
    }
    assert deployment.plan == second
    assert torch.equal(logits_of(deployment.model), logits_of(deploy(biased, plan=second).model))
    assert report.bytes_freed == sum(change.bytes_before - change.bytes_after for change in report.changes) < 0
    assert deployment.replan(plan=second).changes == ()
    assert not any(module.training for module in deployment.model.modules())


def test_heads_of_their_own_change_too(dense: Path) -> None:
    deployment = deploy(dense, plan=make_plan(dense, 8, 8, 8, 8, head=4))
    assert bits_of(deployment)["lm_head"] == 4
    deployment.replan(plan=make_plan(dense, 8, 8, 8, 8))
    assert isinstance(deployment.model.lm_head, nn.Linear)
    assert torch.equal(logits_of(deployment.model), logits_of(deploy(dense, plan=make_plan(dense, 8, 8, 8, 8)).model))


def test_twenty_replans_give_the_same_text_for_the_same_plan(dense: Path) -> None:
    deployment = deploy(dense)
    seen: dict[str, tuple[Plan, torch.Tensor, list[int]]] = {}
    for budget in itertools.islice(itertools.cycle(BUDGETS), 20):
        report = deployment.replan(budget)
        assert deployment.needed_bytes <= (report.budget_bytes or 0)
        found = (deployment.plan.layers, logits_of(deployment.model), text_of(deployment))
        layers, logits, text = seen.setdefault(budget, found)
        assert found[0] == layers
        assert torch.equal(found[1], logits)
        assert found[2] == text
    assert len({str(text) for _, _, text in seen.values()}) > 2


def test_a_replan_without_a_budget_follows_the_last_one(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = deploy(dense, "auto")
    monkeypatch.setenv("QTALE_MEMORY_BUDGET", "700KiB")
    assert deployment.replan().budget_source == "QTALE_MEMORY_BUDGET"
    small = deployment.weights_bytes
    deployment.replan("900KiB")
    assert deployment.weights_bytes > small
    assert deployment.replan().budget_bytes == 900 << 10


def test_what_the_model_holds_counts_as_room(dense: Path) -> None:
    free = 10 << 20
    device = qtale.memory.Device("cpu", "main memory", free, free)
    deployment = deploy(dense, "auto", probe=lambda: [device])
    held = deployment.weights_bytes
    assert deployment.report.budget_bytes == int(0.95 * free)
    assert deployment.room().num_bytes == int(0.95 * free) + held
    device = qtale.memory.Device("cpu", "main memory", free, 0)
    assert deployment.room().num_bytes == held
    # KV cache and workspace no longer fit beside the weights, so those must shrink.
    assert deployment.replan().bytes_freed > 0


def test_a_saved_deployment_opens_as_any_quantized_folder(biased: Path, tmp_path: Path) -> None:
    deployment = deploy(biased, plan=make_plan(biased, 8, 8, 8, 8))
    deployment.replan(plan=make_plan(biased, 8, MIXED, 16, 2))
    deployment.model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(qtale.load_torch(tmp_path / "saved")), logits_of(deployment.model))
    deployment.replan(plan=make_plan(biased, 16, 16, 16, 16))
    assert not hasattr(deployment.model.config, "quantization_config")


def test_resident_memory_is_read_from_the_kernel() -> None:
    before = resident_bytes()
    if before is None:
        pytest.skip("this system does not tell what a process holds")
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = resident_bytes() or 0
    assert after - before == pytest.approx(held.nbytes, rel=0.1)
