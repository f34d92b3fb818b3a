"""`qtale.plan`: bits follow importance times error under a budget of bytes or an average; everything wrong is named."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import qtale
from plan_samples import LAYERS, MODULES, PARTS, save_importance, save_model
from qtale.errors import CheckpointError, InputError, UnsupportedError
from qtale.memory import Budget
from qtale.planner import BudgetError, Options, Plan, Planner, open_source
from qtale.planner.wait import wait_until_it_fits
from tiny_models import make_tiny

FALLING = {"jaccard": [0.9, 0.7, 0.4, 0.1]}
BY_LAYER = Options(granularity="layer", choices=(8, 4, 2), group_size=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tied", tied=True)


def make(source: Path, budget: int | str | None = None, **arguments: Any) -> Plan:
    return qtale.plan(source, budget, progress=False, **arguments)


def widths(plan: Plan) -> list[int | None]:
    return [layer.num_bits for layer in plan.layers]


def plain_error(weight: torch.Tensor, bits: int, group: int) -> float:
    """|ŵ - w|² / |w|² of symmetric rounding in plain torch, scales in the dtype of the weight."""
    rows = weight.float().reshape(weight.shape[0], -1, group)
    scale = (rows.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)).to(weight.dtype).float()
    codes = (rows / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return float((codes * scale - rows).square().sum() / rows.square().sum())


@pytest.mark.parametrize("average", [2.5, 3.0, 4.5, 6.0])
def test_bits_minimise_importance_times_error(model: Path, tmp_path: Path, average: float) -> None:
    source = save_importance(tmp_path / "importance.json", model, FALLING)
    found = make(source, bits=average, options=BY_LAYER)
    tensors = load_file(model / "model.safetensors")
    losses = [
        {
            bits: score * sum(plain_error(tensors[f"model.layers.{layer}.{part}.weight"], bits, 32) for part in PARTS)
            for bits in (8, 4, 2)
        }
        for layer, score in enumerate(FALLING["jaccard"])
    ]
    every = (choice for choice in itertools.product((8, 4, 2), repeat=LAYERS) if sum(choice) <= average * LAYERS)
    best = min(sum(row[bits] for row, bits in zip(losses, choice, strict=True)) for choice in every)
    loss = sum(row[bits or 0] for row, bits in zip(losses, widths(found), strict=True))
    assert loss == pytest.approx(best, rel=1e-3)
    assert sum(bits or 0 for bits in widths(found)) <= average * LAYERS
    assert (found.metric, found.budget_bytes, found.group_size) == ("jaccard", None, 32)


def test_more_important_layers_get_more_bits_whatever_the_sign_of_the_scores(model: Path, tmp_path: Path) -> None:
    scores = {"lim": [-0.2, -0.9, -0.95, -0.4], "bi": [0.1, 0.2, 0.7, 0.9]}
    source = save_importance(tmp_path / "importance.json", model, scores)
    for metric, wanted in (("lim", [8, 4, 4, 8]), ("bi", [4, 4, 8, 8]), ("auto", [4, 4, 8, 8])):
        options = Options(granularity="layer", choices=(8, 4), group_size=32, metric=metric)
        assert widths(make(source, bits=6, options=options)) == wanted, metric


@pytest.mark.parametrize("mode", ["greedy", "knapsack"])
def test_a_byte_budget_is_kept_and_used(model: Path, mode: str) -> None:
    planner = Planner(open_source(model), Options(mode=mode, context=16, choices=(16, 8, 4, 3, 2)).resolved())
    with pytest.raises(BudgetError) as caught:
        planner.for_bytes(1)
    least, most = caught.value.least, planner.for_bytes(1 << 40).needed_bytes
    assert planner.for_bytes(least).needed_bytes == least
    with pytest.raises(BudgetError, match=f"least budget that would do is {least} B"):
        planner.for_bytes(least - 1)
    for budget in range(least, most, (most - least) // 7):
        needed = planner.for_bytes(budget).needed_bytes
        assert budget - 60_000 < needed <= budget
    assert set(widths(planner.for_bytes(most))) == {16}


def test_a_plan_says_what_context_it_has_room_for(model: Path) -> None:
    options = Options(context=16, batch=2, group_size=32)
    found = make(model, bits=4, options=options)
    assert (found.context, found.batch) == (16, 2)
    again = Options.of_plan(found)
    assert (again.context, again.batch, again.group_size) == (16, 2, 32)
    reserved = make(model, bits=4, options=Options(reserve=1000))
    assert (reserved.context, reserved.batch) == (None, None)
    assert Options.of_plan(reserved).context == Options().context


def test_tied_modules_get_the_same_bits(model: Path) -> None:
    found = make(model, bits=4.3)
    assert any(layer.modules for layer in found.layers)
    for layer in range(LAYERS):
        bits = {part: found.bits_of(f"model.layers.{layer}.{part}") for part in PARTS}
        assert len({bits[f"self_attn.{part}_proj"] for part in "qkv"}) == 1
        assert bits["mlp.gate_proj"] == bits["mlp.up_proj"]
    assert Plan.from_json(found.to_json()) == found


def test_uniform_takes_one_width(model: Path) -> None:
    assert widths(make(model, bits=5, options=Options(mode="uniform"))) == [4] * LAYERS
    assert widths(make(model, "10MiB", options=Options(mode="uniform"))) == [16] * LAYERS


def test_measured_errors_are_taken_where_their_groups_are_those_asked_for(model: Path, tmp_path: Path) -> None:
    errors = {str(bits): dict.fromkeys(MODULES, 1e-06) for bits in (8, 4)}
    for part in PARTS:
        errors["4"][f"model.layers.3.{part}"] = 0.5
    scores = {"jaccard": [1.0] * LAYERS}
    source = save_importance(tmp_path / "i.json", model, scores, errors=errors, settings={"group_size": 32})
    options = Options(granularity="layer", choices=(8, 4), group_size=32)
    assert widths(make(source, bits=5, options=options)) == [4, 4, 4, 8]
    by_other_groups = make(source, bits=5, options=Options(granularity="layer", choices=(8, 4), group_size=64))
    own = make(model, bits=5, options=Options(granularity="layer", choices=(8, 4), group_size=64))
    assert widths(by_other_groups) == widths(own)


def test_a_metric_that_predicts_the_loss_of_modules_is_taken_at_its_word(model: Path, tmp_path: Path) -> None:
    costs = {str(bits): dict.fromkeys(MODULES, 0.0) for bits in (8, 4)}
    costs["4"]["model.layers.2.mlp.down_proj"] = 1.0
    source = save_importance(
        tmp_path / "i.json", model, {"fisher": [1.0] * LAYERS, **FALLING}, module_costs={"fisher": costs}
    )
    found = make(source, bits=5, options=Options(choices=(8, 4)))
    assert found.metric == "fisher"
    assert found.bits_of("model.layers.2.mlp.down_proj") == 8
    errors = {str(bits): dict.fromkeys(MODULES, 0.01) for bits in (8, 4)}
    errors["4"]["model.layers.2.mlp.down_proj"] = 1e9
    costs["4"]["model.layers.1.mlp.down_proj"] = 1e-6
    rescaled = save_importance(
        tmp_path / "r.json", model, {"fisher": [1.0] * LAYERS}, module_costs={"fisher": costs}, errors=errors
    )
    # Its error with these groups is far from 1e9, so the prediction for those shrinks with it.
    found = make(rescaled, bits=4.2, options=Options(choices=(8, 4), group_size=32))
    assert found.bits_of("model.layers.1.mlp.down_proj") == 8
    assert found.bits_of("model.layers.2.mlp.down_proj") == 4


def test_the_error_file_is_kept_and_read(model: Path, tied: Path, tmp_path: Path) -> None:
    file = tmp_path / "errors.json"
    options = Options(granularity="layer", choices=(8, 4), group_size=32)
    first = make(model, bits=5, options=options, errors=file)
    kept = json.loads(file.read_text())
    assert set(kept["errors"]) == {"4", "8"}
    assert set(kept["errors"]["4"]) == set(MODULES)
    weight = load_file(model / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert kept["errors"]["4"]["model.layers.1.mlp.up_proj"] == pytest.approx(plain_error(weight, 4, 32), rel=1e-3)
    assert make(model, bits=5, options=options, errors=file) == first
    kept["errors"]["4"] = {name: float(name.startswith("model.layers.1.")) for name in MODULES}
    file.write_text(json.dumps(kept))
    assert widths(make(model, bits=5, options=options, errors=file)) == [4, 8, 4, 4]
    make(model, bits=5, options=BY_LAYER, errors=file)
    assert set(json.loads(file.read_text())["errors"]) == {"2", "4", "8"}
    with pytest.raises(InputError, match="was made for group_size 32, not 64"):
        make(model, bits=5, options=Options(group_size=64), errors=file)
    with pytest.raises(InputError, match="was made for fingerprint"):
        make(tied, bits=5, options=options, errors=file)


def test_the_head_gets_bits_of_its_own_where_it_is_one(model: Path, tied: Path) -> None:
    assert make(model, bits=4, options=Options(head_bits=8)).lm_head_bits == 8
    planner = Planner(open_source(model), Options(head_bits="auto", context=0).resolved(), progress=False)
    assert planner.for_bytes(1 << 30).lm_head_bits == 16
    with pytest.raises(BudgetError) as caught:
        planner.for_bytes(1)
    tight = planner.for_bytes(caught.value.least)
    assert tight.lm_head_bits == 3
    assert tight.needed_bytes == caught.value.least
    with pytest.raises(InputError, match="average says nothing about the head"):
        make(model, bits=4, options=Options(head_bits="auto"))
    with pytest.raises(InputError, match="head bits 8, but this model's head is its embedding"):
        make(tied, bits=4, options=Options(head_bits=8))


def test_scores_of_another_model_are_refused(model: Path, tied: Path, tmp_path: Path) -> None:
    source = save_importance(tmp_path / "importance.json", tied, FALLING)
    with pytest.raises(InputError, match="measured on another model"):
        make(source, bits=4, model=model)
    gone = json.loads(source.read_text())
    gone["model"]["path"] = str(tmp_path / "gone")
    (tmp_path / "gone.json").write_text(json.dumps(gone))
    with pytest.raises(CheckpointError, match=r"cannot be opened; give it with --model: .*gone"):
        make(tmp_path / "gone.json", bits=4)
    assert make(tmp_path / "gone.json", bits=4, model=tied).model.num_layers == LAYERS


def test_waiting_looks_again_until_it_fits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = functools.partial(wait_until_it_fits, sleep=lambda seconds: None)
    monkeypatch.setattr("qtale.planner.make.wait_until_it_fits", waiting)
    free = iter([Budget(1, "test"), Budget(2, "test"), Budget(1 << 30, "test")])
    found = make(model, options=Options(mode="uniform"), wait=True, probe=lambda: next(free))
    assert found.budget_bytes == 1 << 30
    with pytest.raises(BudgetError, match="Waited 0 s"):
        make(model, wait=True, timeout=0, probe=lambda: Budget(1, "test"))
    with pytest.raises(InputError, match="waiting follows the free memory"):
        make(model, "1B", wait=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (Options(mode="best"), "mode 'best' is not known; use paper, greedy, knapsack, uniform"),
        (Options(choices=(8, 5)), "5 bits cannot be chosen; use any of 16, 8, 4, 3, 2"),
        (Options(choices=()), "no bits cannot be chosen"),
        (Options(granularity="row"), "granularity 'row' is not known"),
        (Options(mode="paper", choices=(8, 4)), "mode paper gives whole layers 16, 8 or 4 bits"),
        (Options(head_bits=5), "head bits 5"),
        (Options(mode="paper", head_bits="auto"), "mode paper does not choose bits for the head"),
        (Options(group_size=48), "group_size 48 is not supported"),
        (Options(context=-1), "context -1 and batch 1"),
        (Options(batch=0), "context 2048 and batch 0"),
        (Options(reserve=-5), "reserve -5 is negative"),
        (Options(metric="fisher"), "metric 'fisher' needs scores"),
        (Options(choices=(8, 4)), "an average of 3 bits is below the least of the choices, 4"),
    ],
)
def test_wrong_options_are_named(model: Path, options: Options, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        make(model, bits=3, options=options)
    assert sentence in str(caught.value)


def test_other_mistakes_are_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bits and a budget"):
        make(model, "1GiB", bits=4)
    for bits in (0.0, -1.0, 17.0, float("nan")):
        with pytest.raises(InputError, match="give a number between 2 and 16"):
            make(model, bits=bits)
    source = save_importance(tmp_path / "importance.json", model, FALLING)
    with pytest.raises(InputError, match="no scores by 'zd'; there are jaccard"):
        make(source, bits=4, options=Options(metric="zd"))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"neither importance\.json"):
        make(tmp_path / "other.json", bits=4)
    packed = tmp_path / "packed"
    qtale.quantize(model, packed, progress=False)
    with pytest.raises(UnsupportedError, match="is quantized already; plan from the dense model"):
        make(packed, bits=4)
    fixture = Path(__file__).parent / "fixtures" / "llama-2-7b.json"
    with pytest.raises(UnsupportedError, match="mode knapsack weighs rounding errors, which need the weights"):
        make(fixture, bits=4)


def test_weights_that_cannot_be_rounded_are_named(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    folder = make_tiny(tmp_path / "nan", **{name: torch.full((64, 96), float("nan"))})
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight cannot be quantized"):
        make(folder, bits=4)
