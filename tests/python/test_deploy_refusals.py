"""Deployments that cannot be: one sentence each, and a running model stays exactly as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qtale
from plan_samples import LAYERS, save_importance, save_model
from qtale.checkpoint import fingerprint
from qtale.checkpoint.folder import ModelFolder
from qtale.deployment import Deployment
from qtale.engine import weights
from qtale.errors import CheckpointError, InputError, UnsupportedError
from qtale.planner import BudgetError, LayerBits, Options, Plan, PlannedModel

INPUT_IDS = torch.arange(1, 17).reshape(1, 16)
OPTIONS = Options(group_size=32, context=32)
Edit = Callable[[dict[str, Any]], None]
Deploy = Callable[..., Deployment]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture
def own(dense: Path, tmp_path: Path) -> Path:
    """A copy of the model for tests that break it."""
    shutil.copytree(dense, tmp_path / "own")
    return tmp_path / "own"


def make_plan(model: Path, bits: int) -> Plan:
    about = PlannedModel(fingerprint(model), "llama", LAYERS)
    return Plan(about, "uniform", "none", None, 0, 32, True, tuple(LayerBits(i, bits) for i in range(LAYERS)))


@pytest.fixture(params=["engine", "torch"])
def deploy(request: pytest.FixtureRequest) -> Deploy:
    """`qtale.deploy` on one of the two ways to run."""

    def call(model: Path, budget: int | str = "1GiB", **arguments: Any) -> Deployment:
        return qtale.deploy(model, budget, progress=False, **{"backend": request.param, **arguments})

    return call


def state_of(deployment: Deployment) -> tuple[Any, ...]:
    """What must not change: how the modules run, the logits, the plan and the sizes."""
    if deployment.backend == "engine":
        logits = deployment.engine.logits(INPUT_IDS[0].tolist())
    else:
        with torch.no_grad():
            logits = deployment.model(INPUT_IDS).logits
    return form_of(deployment), logits.tolist(), deployment.plan, deployment.weights_bytes


def form_of(deployment: Deployment) -> Any:
    """How the weights lie in memory: the kinds of modules, or the engine's widths and bytes."""
    if deployment.backend == "engine":
        return repr(deployment.engine)
    kinds = [(name, type(module).__name__) for name, module in deployment.model.named_modules()]
    return kinds, getattr(deployment.model.config, "quantization_config", None)


def hinder(monkeypatch: pytest.MonkeyPatch, backend: str, may_read: Callable[[str], None]) -> None:
    """Call ``may_read`` with the name of what is about to be read, which may raise."""
    read, read_dense = ModelFolder.torch, weights._read_dense

    def torch_read(folder: ModelFolder, name: str) -> torch.Tensor:
        may_read(name)
        return read(folder, name)

    def engine_read(folder: ModelFolder, source: Any, target: Any) -> None:
        may_read(source.module)
        read_dense(folder, source, target)

    if backend == "torch":
        monkeypatch.setattr(ModelFolder, "torch", torch_read)
    else:
        monkeypatch.setattr(weights, "_read_dense", engine_read)


@pytest.mark.parametrize("bits", [16, 8])
def test_a_replan_that_nothing_fits_changes_nothing(deploy: Deploy, dense: Path, bits: int) -> None:
    deployment = deploy(dense, plan=make_plan(dense, bits))
    before = state_of(deployment)
    with pytest.raises(BudgetError, match="the least budget that would do is"):
        deployment.replan("100KiB")
    with pytest.raises(InputError, match="a plan and a budget exclude each other"):
        deployment.replan("1MiB", plan=make_plan(dense, 4))
    with pytest.raises(InputError, match="is no size"):
        deployment.replan("a lot")
    assert state_of(deployment) == before
    assert deployment.replan().changes == () or bits == 8


def test_a_first_budget_that_nothing_fits_names_the_least(deploy: Deploy, dense: Path) -> None:
    with pytest.raises(BudgetError, match="the least budget that would do is") as caught:
        deploy(dense, "100KiB", options=OPTIONS)
    assert deploy(dense, caught.value.least, options=OPTIONS).needed_bytes == caught.value.least
    with pytest.raises(BudgetError, match=r"the plan's weights take .*, more than the 100\.0 KiB there are \(given\)"):
        deploy(dense, "100KiB", plan=make_plan(dense, 4))


def test_a_plan_larger_than_the_room_is_refused_but_a_smaller_one_never(deploy: Deploy, dense: Path) -> None:
    deployment = deploy(dense, "760KiB", plan=make_plan(dense, 4))
    with pytest.raises(BudgetError, match="give a smaller plan, or free memory"):
        deployment.replan(plan=make_plan(dense, 16))
    deployment.room = lambda: qtale.memory.Budget(0, "given")  # type: ignore[method-assign]
    assert deployment.replan(plan=make_plan(dense, 3)).bytes_freed > 0


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda plan: plan["layers"][0].update(num_bits=5), "has num_bits 5; it must be 16, 8, 4, 3, 2"),
        (lambda plan: plan["layers"].append({"layer": 4, "num_bits": 8}), "names layer 4, but the model has layers"),
        (
            lambda plan: plan["layers"].__setitem__(0, {"layer": 0, "modules": {"mlp.side_proj": 8}}),
            "plan: layer 0 gives no bits for",
        ),
        (lambda plan: plan["model"].update(fingerprint="ab" * 32), "was made for another model"),
        (lambda plan: plan.update(lm_head_bits=16.0), "has lm_head_bits 16.0"),
        (lambda plan: plan.pop("layers"), "lacks 'layers'"),
    ],
)
def test_wrong_plans_are_refused_at_first_and_later(
    deploy: Deploy, dense: Path, tmp_path: Path, edit: Edit, sentence: str
) -> None:
    value = make_plan(dense, 4).to_json()
    edit(value)
    (tmp_path / "plan.json").write_text(json.dumps(value))
    deployment = deploy(dense, plan=make_plan(dense, 8))
    before = state_of(deployment)
    with pytest.raises(InputError, match=sentence):
        deployment.replan(plan=tmp_path / "plan.json")
    assert state_of(deployment) == before
    with pytest.raises(InputError, match=sentence):
        deploy(dense, plan=tmp_path / "plan.json")


def test_other_wrong_arguments(deploy: Deploy, dense: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", seed=9)
    scores = save_importance(tmp_path / "importance.json", other, {"jaccard": [0.1, 0.2, 0.3, 0.4]})
    with pytest.raises(InputError, match="another model"):
        deploy(dense, importance=scores)
    with pytest.raises(InputError, match=r"is no importance\.json"):
        deploy(dense, importance=dense / "config.json")
    with pytest.raises(InputError, match="compute 'int4' is not a mode"):
        deploy(dense, compute="int4")
    with pytest.raises(InputError, match="backend 'cuda' is not known; use 'auto', 'engine', 'torch'"):
        deploy(dense, backend="cuda")
    with pytest.raises(InputError, match=r"plan\.json: cannot be read"):
        deploy(dense, plan=tmp_path / "plan.json")
    qtale.quantize(dense, tmp_path / "packed", progress=False)
    with pytest.raises(UnsupportedError, match="is quantized already"):
        deploy(tmp_path / "packed")
    (tmp_path / "shapes").mkdir()
    shutil.copy(dense / "config.json", tmp_path / "shapes")
    with pytest.raises(CheckpointError, match="has neither"):
        deploy(tmp_path / "shapes")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def replace_weights(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (truncate, "is truncated"),
        (Path.unlink, "has neither"),
        (replace_weights, "its weights are no longer those that were deployed"),
    ],
)
def test_folders_broken_since_then_change_nothing(
    deploy: Deploy, own: Path, harm: Callable[[Path], None], sentence: str
) -> None:
    deployment = deploy(own, plan=make_plan(own, 8))
    before = state_of(deployment)
    smaller = make_plan(own, 4)
    harm(own / "model.safetensors")
    with pytest.raises(CheckpointError, match=sentence):
        deployment.replan(plan=smaller)
    assert state_of(deployment) == before


def with_nan(model: Path, name: str) -> None:
    """Put a NaN into one weight; a layer that stays as stored runs with it, and cannot be quantized."""
    tensors = load_file(model / "model.safetensors")
    tensors[name][5, 7] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_a_change_that_fails_half_way_is_taken_back(deploy: Deploy, own: Path) -> None:
    with_nan(own, "model.layers.2.mlp.up_proj.weight")
    deployment = deploy(own, plan=make_plan(own, 16))
    before = form_of(deployment)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight cannot be quantized: .*NaN"):
        deployment.replan(plan=make_plan(own, 8))
    assert form_of(deployment) == before
    assert deployment.plan == make_plan(own, 16)
    assert deployment.weights_bytes == deployment.report.stored_bytes


def test_an_interrupted_change_is_taken_back(deploy: Deploy, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = deploy(dense, plan=make_plan(dense, 8))
    before = state_of(deployment)
    reads: list[str] = []

    def interrupt(name: str) -> None:
        reads.append(name)
        if len(reads) == 10:
            raise KeyboardInterrupt

    hinder(monkeypatch, deployment.backend, interrupt)
    with pytest.raises(KeyboardInterrupt):
        deployment.replan(plan=make_plan(dense, 4))
    # What was done is read again; the engine reads what shares a product together.
    taken_back = {"torch": 9, "engine": 8}[deployment.backend]
    assert sorted(reads[10:]) == sorted(reads[:taken_back])
    assert state_of(deployment) == before


def test_files_lost_half_way_leave_a_model_that_runs(
    deploy: Deploy, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = deploy(dense, plan=make_plan(dense, 8))
    before = state_of(deployment)
    reads = iter(range(1000))

    def lose(name: str) -> None:
        if next(reads) >= 9:
            raise CheckpointError(f"{name}: cannot be read: Input/output error.")

    stuck = {"torch": 9, "engine": 8}[deployment.backend]
    with monkeypatch.context() as patched:
        hinder(patched, deployment.backend, lose)
        with pytest.raises(CheckpointError, match=f"could not be taken back in {stuck} modules"):
            deployment.replan(plan=make_plan(dense, 4))
    assert state_of(deployment) != before
    report = deployment.replan(plan=make_plan(dense, 8))
    assert len(report.changes) == stuck
    assert state_of(deployment)[1:] == before[1:]


def test_models_that_are_not_made_of_linears_are_refused(tmp_path: Path) -> None:
    import transformers

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnsupportedError, match="is a Conv1D in transformers' GPT2LMHeadModel"):
        qtale.deploy(tmp_path / "gpt2", "1GiB", progress=False)
    with pytest.raises(UnsupportedError, match="the engine does not run this model; use backend 'auto' or 'torch'"):
        qtale.deploy(tmp_path / "gpt2", "1GiB", backend="engine", progress=False)


def test_pytorch_refuses_the_options_of_the_engine(dense: Path) -> None:
    for options, named in (({"num_threads": 2}, "num_threads"), ({"num_threads": 1, "kv_rule": "keep"}, ", kv_rule")):
        with pytest.raises(InputError, match=f"{named}: for the engine only, but PyTorch runs this model; leave"):
            qtale.deploy(dense, "1GiB", backend="torch", progress=False, **options)  # type: ignore[arg-type]
