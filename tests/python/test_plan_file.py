"""plan.json: written for people, read back with every mistake named; and the fingerprint that ties it to a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtale import QuantSpec
from qtale.checkpoint import fingerprint
from qtale.errors import InputError
from qtale.planner import LayerBits, Plan, PlannedModel
from tiny_models import files_in, make_tiny

INSIDE = (*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))


def make_plan(**changes: Any) -> Plan:
    """Three layers: 8 bits, modules of their own, and as stored."""
    mixed = dict(zip(INSIDE, (4, 4, 4, 8, 3, 3, 16), strict=True))
    layers = (LayerBits(0, 8), LayerBits(1, modules=mixed), LayerBits(2, 16))
    fields: dict[str, Any] = {
        **{"model": PlannedModel("ab" * 32, "llama", 3), "mode": "knapsack", "metric": "fisher"},
        **{"budget_bytes": 10**9, "needed_bytes": 10**8, "group_size": 64, "symmetric": True, "layers": layers},
    }
    return Plan(**{**fields, **changes})


def modules_of(layers: int) -> list[str]:
    return [f"model.layers.{layer}.{name}" for layer in range(layers) for name in INSIDE]


def test_a_plan_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    plan = make_plan(lm_head_bits=8)
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    assert files_in(tmp_path) == ["plan.json"]
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert '    {"layer": 0, "num_bits": 8},' in lines
    assert make_plan(budget_bytes=None, group_size="channel") == Plan.from_json(
        make_plan(budget_bytes=None, group_size="channel").to_json()
    )


def test_context_and_batch_are_kept_and_may_be_missing() -> None:
    sized = make_plan(context=512, batch=2)
    assert sized.to_json()["context"] == 512
    assert Plan.from_json(sized.to_json()) == sized
    older = make_plan()
    assert {"context", "batch"}.isdisjoint(older.to_json())
    assert Plan.from_json(older.to_json()) == older


def test_specs_are_those_of_the_layer_and_module() -> None:
    plan = make_plan(lm_head_bits=8)
    assert plan.spec_of("model.layers.0.mlp.up_proj") == QuantSpec(8, 64)
    assert plan.spec_of("model.layers.1.mlp.up_proj") == QuantSpec(3, 64)
    assert plan.spec_of("model.layers.1.mlp.down_proj") is None
    assert plan.spec_of("model.layers.2.mlp.up_proj") is None
    assert plan.spec_of("lm_head") == QuantSpec(8, 64)
    assert plan.spec_of("model.embed_tokens") is None
    with pytest.raises(InputError, match=r"layers 0 to 2, but model.layers.3.mlp.up_proj lies in layer 3"):
        plan.spec_of("model.layers.3.mlp.up_proj")
    with pytest.raises(InputError, match=r"layer 1 gives no bits for 'mlp.other'"):
        plan.spec_of("model.layers.1.mlp.other")


def test_a_plan_is_refused_for_another_model() -> None:
    plan = make_plan()
    plan.check_model("ab" * 32, modules_of(3))
    with pytest.raises(
        InputError, match=r"another model \(fingerprint abababababab, llama of 3 layers\), not .* \(cdcd"
    ):
        plan.check_model("cd" * 32, modules_of(3))
    with pytest.raises(InputError, match="names layer 2, which the model does not have"):
        plan.check_model("ab" * 32, modules_of(2))
    with pytest.raises(InputError, match=r"names module 'self_attn.o_proj' in layer 1"):
        plan.check_model("ab" * 32, [name for name in modules_of(3) if "o_proj" not in name])


def edit(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: plan.__setitem__(key, value)


def edit_layer(layer: int, entry: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: plan["layers"].__setitem__(layer, entry)


def edit_module(name: str, bits: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: plan["layers"][1]["modules"].__setitem__(name, bits)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (edit("format", "other"), "is no plan"),
        (edit("version", 2), "version 2; this qtale reads version 1"),
        (edit("mode", "magic"), "mode 'magic'; it must be paper or greedy or knapsack or uniform"),
        (edit("budget_bytes", -1), "budget_bytes -1; it must be a number of bytes or null"),
        (edit("needed_bytes", 1.5), "needed_bytes 1.5"),
        (edit("group_size", 48), "group_size 48; it must be auto, channel, 128, 64, 32"),
        (edit("symmetric", 1), "symmetric 1; it must be true or false"),
        (edit("lm_head_bits", 5), "lm_head_bits 5; it must be 16, 8, 4, 3, 2"),
        (edit("layers", {}), "'layers' must be a list"),
        (edit("extra", 1), "unknown field 'extra'"),
        (edit("context", -1), "context -1; it must be a whole number, 0 or more"),
        (edit("batch", 0), "batch 0; it must be a whole number, 1 or more"),
        (edit("batch", True), "batch True"),
        (lambda plan: plan.pop("metric"), "lacks 'metric'"),
        (lambda plan: plan["model"].update(num_layers=True), "num_layers True"),
        (lambda plan: plan["model"].update(fingerprint=7), "fingerprint 7"),
        (lambda plan: plan["layers"].pop(), "lacks layer 2; every layer from 0 to 2 needs its bits"),
        (edit_layer(2, {"layer": 7, "num_bits": 4}), "names layer 7, but the model has layers 0 to 2"),
        (edit_layer(2, {"layer": 0, "num_bits": 4}), "names layer 0 twice"),
        (edit_layer(2, "all"), "entry 2 of 'layers' must be an object"),
        (edit_layer(2, {"layer": 2, "num_bits": 5}), "layer 2: has num_bits 5; it must be 16, 8, 4, 3, 2"),
        (edit_layer(2, {"layer": 2, "num_bits": "4"}), "layer 2: has num_bits '4'"),
        (edit_layer(2, {"layer": 2, "num_bit": 4}), "layer 2: lacks 'num_bits'"),
        (edit_layer(2, {"layer": 2, "num_bits": 4, "modules": {"q_proj": 4}}), "layer 2: has the unknown field"),
        (edit_layer(2, {"layer": 2, "modules": {}}), "layer 2: 'modules' must be an object of module names"),
        (edit_module("mlp.down_proj", 7), "layer 1: has mlp.down_proj 7; it must be 16, 8, 4, 3, 2"),
        (edit_module("self_attn.k_proj", 8), "self_attn.q_proj has 4 bits and self_attn.k_proj 8; engines fuse"),
    ],
)
def test_a_mistake_in_a_plan_is_named(change: Callable[[dict[str, Any]], None], sentence: str, tmp_path: Path) -> None:
    value = make_plan().to_json()
    change(value)
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(InputError) as caught:
        Plan.read(tmp_path / "plan.json")
    assert sentence in str(caught.value)
    assert str(tmp_path / "plan.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1", "[]", "{}", "nul", "[" * 100_000])
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan.json: is (not valid JSON|no plan)"):
        Plan.read(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"cannot be read: .*; make it with `qtale plan`"):
        Plan.read(tmp_path / "none.json")


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    text = make_plan().text().replace('"mlp.up_proj": 3', '"mlp.up_proj": 3, "mlp.up_proj": 2')
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan\.json: 'mlp\.up_proj' stands twice in one object"):
        Plan.read(tmp_path / "plan.json")


def test_a_plan_of_absurdly_many_layers_is_refused_at_once() -> None:
    value = make_plan().to_json()
    value["model"]["num_layers"] = 2**62
    with pytest.raises(InputError, match="lacks layer 3; every layer"):
        Plan.from_json(value)


def test_the_fingerprint_follows_weights_and_architecture_alone(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "one")
    first = fingerprint(model)
    assert len(first) == 64
    assert fingerprint(shutil.copytree(model, tmp_path / "copy")) == first
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_version": "9"}))
    assert fingerprint(model) == first
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 65}))
    assert fingerprint(model) != first
    changed = load_file(tmp_path / "copy" / "model.safetensors")
    changed["model.layers.0.mlp.up_proj.weight"] = changed["model.layers.0.mlp.up_proj.weight"] + torch.tensor(1.0)
    save_file(changed, tmp_path / "copy" / "model.safetensors")
    assert fingerprint(tmp_path / "copy") != first


def test_the_fingerprint_does_not_depend_on_how_the_model_is_split(tmp_path: Path) -> None:
    whole = make_tiny(tmp_path / "whole")
    split = tmp_path / "split"
    split.mkdir()
    shutil.copy(whole / "config.json", split)
    tensors = load_file(whole / "model.safetensors")
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, split / file)
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert fingerprint(split) == fingerprint(whole)
