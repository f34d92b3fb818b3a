"""The steps of the recipes: MagR's descent, AWQ's folding, the factor of the Hessian, stages of a layer."""

from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from importance_samples import ARCHITECTURES, save_model, some_tokens
from qtale import QuantSpec, SolverOptions
from qtale.checkpoint import open_folder
from qtale.errors import InputError
from qtale.layerwise.model import LayeredModel
from qtale.layerwise.states import MemoryStates
from qtale.ptq.awq import scale_inputs
from qtale.ptq.layer import LayerSolver
from qtale.ptq.magr import largest_eigenvalue, shrink_magnitudes
from qtale.ptq.matrix import inverse_factor
from qtale.ptq.recipe import recipe_of
from qtale.ptq.streams import DENSE, QUANTIZED, Streams
from qtale.ptq.worklist import list_work
from qtale.spec import ResolvedSpec


def problem(rows: int, size: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, size, generator=generator) * torch.rand(size, generator=generator).add(0.05)
    return torch.randn(rows, size, generator=generator), inputs.T @ inputs / tokens


def objective(weight: torch.Tensor, found: torch.Tensor, hessian: torch.Tensor, group: int, alpha: float) -> float:
    """MagR's, with H over its largest eigenvalue as :func:`largest_eigenvalue` bounds it."""
    change = (found - weight).double()
    scaled = hessian.double() / (largest_eigenvalue(hessian) * 1.02)
    largest = found.double().reshape(len(found), -1, group or found.shape[1]).abs().amax(-1)
    return float(0.5 * ((change @ scaled) * change).sum() + alpha * largest.sum())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), group=st.sampled_from([0, 32]), alpha=st.sampled_from([1e-4, 1e-3, 1e-2]))
def test_magr_descends_and_keeps_products(seed: int, group: int, alpha: float) -> None:
    weight, hessian = problem(6, 64, 40, seed)
    values = [objective(weight, weight, hessian, group, alpha)]
    for iterations in (1, 2, 5, 20):
        found = shrink_magnitudes(weight, hessian, group, alpha, iterations)
        values.append(objective(weight, found, hessian, group, alpha))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(values))
    before = weight.reshape(6, -1, group or 64).abs().amax(-1)
    assert bool((found.reshape(6, -1, group or 64).abs().amax(-1) <= before + 1e-6).all())
    # |X (w - w0)|² / lambda_max <= 2 alpha max|w0|, summed over groups (the paper's theorem 1, H over lambda_max).
    change = (found - weight).double()
    error = ((change @ (hessian.double() / (largest_eigenvalue(hessian) * 1.02))) * change).sum(1)
    assert bool((error <= 2 * alpha * before.double().sum(1) + 1e-9).all())


@pytest.mark.parametrize("size", [1, 3, 64])
def test_largest_eigenvalue(size: int) -> None:
    _, hessian = problem(1, size, 50, 1)
    exact = float(torch.linalg.eigvalsh(hessian.double())[-1])
    assert 0.97 * exact <= largest_eigenvalue(hessian) <= 1.0001 * exact


@pytest.mark.parametrize("tokens", [200, 10])
def test_inverse_factor(tokens: int) -> None:
    _, hessian = problem(1, 40, tokens, 2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    factor = inverse_factor("matrix", hessian, order, 0.01).double()
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    permuted = damped[order.long()][:, order.long()]
    assert bool((factor.tril(-1) == 0).all())
    assert torch.allclose(factor.T @ factor @ permuted, torch.eye(40, dtype=torch.float64), atol=1e-3)


def test_a_singular_hessian_is_damped_more(caplog: pytest.LogCaptureFixture) -> None:
    hessian = torch.ones(8, 8)
    hessian[0, 0] -= 0.2
    assert bool(inverse_factor("layer 3", hessian, None, 0.01).isfinite().all())
    assert "layer 3: its Hessian is singular" in caplog.text
    with pytest.raises(InputError, match=r"layer 3: its Hessian stays singular"):
        inverse_factor("layer 3", torch.full((8, 8), -1.0), None, 0.01)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(folder / kind, kind) for kind in ARCHITECTURES}


def solver_of(path: Path, index: int, kinds: tuple[str, ...] = (QUANTIZED, DENSE)) -> tuple[LayeredModel, Streams]:
    model = LayeredModel(open_folder(path), "quantize")
    streams = Streams(model, MemoryStates(), some_tokens(6, 24), kinds)
    streams.embed()
    for earlier in range(index):
        with model.layer(earlier) as layer:
            for kind in kinds:
                streams.advance(kind, earlier, layer, lambda _: None)
    return model, streams


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_stages_are_those_of_the_block(models: dict[str, Path], kind: str) -> None:
    model, streams = solver_of(models[kind], 1)
    rows = list_work(open_folder(models[kind]), QuantSpec(4, 32), {}).rows
    with closing(model), model.layer(1) as layer:
        stages = LayerSolver(model, streams, 1, layer, rows, SolverOptions("gptq")).stages
    short = [{name.rpartition(".")[2] for name in stage.modules} for stage in stages]
    if kind == "phi3":
        assert short == [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}]
    else:
        assert short == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    # Gemma 2 and OLMo 2 have a norm between a product and the residual stream.
    added = [stage.residual is not None for stage in stages]
    assert added == ([False] * 4 if kind in ("gemma2", "olmo2") else [False, True, False, True])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_awq_leaves_the_dense_function_alone(models: dict[str, Path], kind: str) -> None:
    model, streams = solver_of(models[kind], 1)
    rows = list_work(open_folder(models[kind]), QuantSpec(3, 32), {}).rows
    with closing(model), model.layer(1) as layer:
        hidden = streams.read(QUANTIZED, 1, 0, 6)
        before = layer(hidden)
        solver = LayerSolver(model, streams, 1, layer, rows, SolverOptions("awq"))
        weights = {name: solver.weights.dense(name).clone() for name in model.linears(1)}
        norms = scale_inputs(solver)
        after = layer(hidden)
        changed = [name for name, weight in weights.items() if not torch.equal(weight, solver.weights.dense(name))]
    assert torch.allclose(after, before, atol=1e-4 * float(before.abs().max()))
    assert any(name.endswith("down_proj") for name in changed) or kind == "phi3"
    # Gemma's norms multiply by 1 + weight, OLMo 2's come after the products.
    assert bool(norms) == (kind not in ("gemma2", "olmo2"))


def test_hidden_states_that_are_not_finite_name_the_layer(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    import qtale
    from qtale.errors import CheckpointError

    path = save_model(tmp_path / "model")
    folder = open_folder(path)
    tensors = {name: folder.torch(name) for name in folder.tensors}
    tensors["model.layers.1.post_attention_layernorm.weight"][0] = np.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises((CheckpointError, InputError), match=r"layers?[ .]1"):
        qtale.quantize(path, tmp_path / "out", QuantSpec(4, 32), method="gptq", tokens=some_tokens(), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("group_size", [0, 64])
def test_ranges_after_magr_are_searched_before_gptq_and_shrunk_before_rounding(group_size: int) -> None:
    spec = ResolvedSpec(3, group_size, True)
    searched, rounded = (recipe_of(SolverOptions(method), spec) for method in ("magr+gptq", "magr+rtn"))
    assert searched.search == recipe_of(SolverOptions("gptq"), spec).search > 1
    assert searched.shrink == 1
    assert rounded.search == 1
    assert rounded.shrink == (0.95 if group_size else 0.9)
