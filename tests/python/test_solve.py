"""qtale.solve on every instruction set: GPTQ and the scale search against plain NumPy, descent, proximal steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import solve_oracle as oracle
from qtale import _core, ops, solve
from qtale.errors import InputError

Array = np.ndarray[Any, Any]
FORMS = [(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in (0, 8, 24) for symmetric in (True, False)]


@pytest.fixture(params=_core.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn."""
    before = _core.cpu_isa()
    _core.set_cpu_isa(request.param)
    yield request.param
    _core.set_cpu_isa(before)


def zero_point_of(grids: oracle.Grids, symmetric: bool) -> Array | None:
    """What the solver takes."""
    return None if symmetric else grids.zero.astype(np.int8)


@pytest.mark.parametrize(("bits", "size", "symmetric"), FORMS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("kind", ["full", "dead", "rank"])
def test_gptq_with_given_grids_makes_the_integers_of_numpy(
    isa: str, bits: int, size: int, symmetric: bool, act_order: bool, kind: str
) -> None:
    problem = oracle.Problem(37, 72, samples=40 if kind == "rank" else 400, dead=5 if kind == "dead" else 0, seed=bits)
    order = problem.by_size if act_order else problem.natural
    factor = problem.factor(order)
    group = size or 72
    grids = oracle.grids_of(problem.weight.astype(np.float64), bits, group, symmetric, 0.97)
    expected, _, closest = oracle.gptq(problem.weight, factor, order, group, grids, False, symmetric)
    scale = grids.scale.astype(np.float32)
    found = solve.gptq(
        problem.weight,
        factor,
        bits,
        scale=scale,
        zero_point=zero_point_of(grids, symmetric),
        order=order if act_order else None,
    )
    same = (found.codes == expected).all(axis=1)
    assert np.all(closest[~same] < 2e-4)
    assert same.mean() > 0.9
    damped = np.linalg.inv(factor.astype(np.float64).T @ factor)
    d = (problem.weight - oracle.dequantized(found.codes, grids))[:, order]
    np.testing.assert_allclose(found.loss[same], np.einsum("ri,ij,rj->r", d, damped, d)[same], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("bits", "size", "symmetric"), FORMS)
def test_gptq_finds_grids_as_it_goes(isa: str, bits: int, size: int, symmetric: bool) -> None:
    problem = oracle.Problem(19, 72, seed=10 + bits)
    # The largest weight of a symmetric group is half way between two codes; of a positive one both are clamped to one.
    problem.weight += np.float32(2.0)
    factor, group = problem.factor(problem.natural), size or 72
    start = oracle.Grids(np.ones((19, 72 // group)), np.zeros((19, 72 // group)), bits)
    expected, grids, closest = oracle.gptq(problem.weight, factor, problem.natural, group, start, True, symmetric)
    found = solve.gptq(problem.weight, factor, bits, group_size=size, symmetric=symmetric)
    same = (found.codes == expected).all(axis=1)
    assert np.all(closest[~same] < 2e-4)
    assert same.mean() > 0.8
    np.testing.assert_allclose(found.scale[same], grids.scale[same], rtol=1e-5)


def test_gptq_of_an_identity_is_round_to_nearest(isa: str) -> None:
    problem = oracle.Problem(50, 96)
    for bits, size, symmetric in FORMS:
        for dtype in ("float32", "float16"):
            codes, scale, zero_point = ops.quantize(problem.weight, bits, size, symmetric, dtype)
            identity = np.eye(96, dtype=np.float32)
            given_grids = solve.gptq(problem.weight, identity, bits, scale=scale, zero_point=zero_point)
            own = solve.gptq(problem.weight, identity, bits, group_size=size, symmetric=symmetric, scale_dtype=dtype)
            for found in (given_grids, own):
                np.testing.assert_array_equal(found.codes, codes)
                np.testing.assert_array_equal(found.scale, scale)
                if zero_point is not None:
                    np.testing.assert_array_equal(found.zero_point, zero_point)


def test_gptq_beats_round_to_nearest_and_takes_torch_tensors(isa: str) -> None:
    problem = oracle.Problem(64, 160, seed=3)
    for order in (problem.natural, problem.by_size):
        codes, scale, _ = ops.quantize(problem.weight, 3, 32)
        factor = problem.factor(order)
        found = solve.gptq(problem.weight, factor, 3, scale=scale, order=order)
        grids = oracle.grids_from(scale, None, 3)
        rounded = oracle.objective(problem.weight, oracle.dequantized(codes, grids), problem.hessian)
        solved = oracle.objective(problem.weight, oracle.dequantized(found.codes, grids), problem.hessian)
        assert solved.sum() < 0.7 * rounded.sum()
        tensors = [torch.from_numpy(a) for a in (problem.weight, factor, scale, order)]
        again = solve.gptq(tensors[0], tensors[1], 3, scale=tensors[2], order=tensors[3])
        assert torch.equal(again.codes, torch.from_numpy(found.codes))
        assert again.loss.dtype is torch.float64


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(isa: str, threads: int) -> None:
    problem = oracle.Problem(131, 250, seed=4)

    def everything() -> list[Any]:
        factor = problem.factor(problem.by_size)
        scale, zero_point = solve.search_scales(problem.weight, problem.diagonal, 3, 50, False, steps=10)
        first = solve.gptq(problem.weight, factor, 3, scale=scale, zero_point=zero_point, order=problem.by_size)
        second = solve.gptq(problem.weight, problem.factor(problem.natural), 3, group_size=50)
        refined, changes = solve.refine_codes(problem.weight, problem.hessian, 3, first.codes, scale, zero_point)
        refit = solve.refit_scales(problem.weight, problem.hessian, 3, refined, scale, zero_point)
        gram = np.zeros((250, 250))
        solve.accumulate_gram(problem.weight, gram)
        loss = solve.rounding_loss(problem.weight, problem.hessian, 4, 50)
        return [*first, *second[:2], second.loss, refined, changes, *refit, gram, loss]

    before = _core.num_threads()
    try:
        _core.set_num_threads(1)
        expected = everything()
        _core.set_num_threads(threads)
        for a, b in zip(expected, everything(), strict=True):
            np.testing.assert_array_equal(a, b)
    finally:
        _core.set_num_threads(before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("blocks", [False, True])
def test_search_finds_the_best_of_its_grids(isa: str, symmetric: bool, blocks: bool) -> None:
    problem, size, steps, least = oracle.Problem(21, 60, dead=3, seed=5), 12, 17, 0.3
    problem.weight += np.float32(2.0)  # see above: a form tells codes at equal distances apart
    parts = [problem.hessian[k : k + size, k : k + size] for k in range(0, 60, size)]
    importance = np.ascontiguousarray(np.stack(parts)) if blocks else problem.diagonal
    scale, zero_point = solve.search_scales(
        problem.weight, importance, 3, size, symmetric, steps=steps, narrowest=least, widest=1.1, signed=symmetric
    )
    grids = oracle.grids_from(scale, zero_point, 3)
    for g in range(60 // size):
        w = problem.weight[:, g * size : (g + 1) * size].astype(np.float64)
        h = parts[g] if blocks else np.diag(np.diag(parts[g]))

        def error(scale: Array, zero: Array, w: Array = w, h: Array = h) -> Array:
            one = oracle.Grids(scale[:, None], zero[:, None], 3)
            q = np.stack([one.values(one.codes(c, 0), 0) for c in w.T], axis=1)
            return oracle.objective(w, q, h)

        tried = [error(*oracle.grid_of(w, 3, symmetric, s)) for s in np.linspace(1.1, least, steps)]
        if symmetric:
            tried += [error(-oracle.grid_of(w, 3, True, s)[0], 0 * w[:, 0]) for s in np.linspace(1.1, least, steps)]
        best = np.min(tried, axis=0)
        assert np.all(error(grids.scale[:, g], grids.zero[:, g]) <= best * (1 + 1e-4) + 1e-12)


def test_a_search_of_one_step_is_the_rule_of_quantize(isa: str) -> None:
    problem = oracle.Problem(30, 64)
    for symmetric in (True, False):
        for dtype in ("float32", "float16"):
            scale, zero_point = solve.search_scales(problem.weight, problem.diagonal, 4, 16, symmetric, dtype, steps=1)
            _, expected, zeros = ops.quantize(problem.weight, 4, 16, symmetric, dtype)
            np.testing.assert_array_equal(scale, expected)
            if zeros is not None:
                np.testing.assert_array_equal(zero_point, zeros)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["full", "dead", "rank"])
def test_refining_never_raises_the_objective(isa: str, symmetric: bool, kind: str) -> None:
    problem = oracle.Problem(45, 96, samples=30 if kind == "rank" else 400, dead=6 if kind == "dead" else 0, seed=6)
    for bits, size in ((2, 0), (3, 24), (4, 12), (8, 0)):
        codes, scale, zero_point = ops.quantize(problem.weight, bits, size, symmetric)
        grids = oracle.grids_from(scale, zero_point, bits)
        before = oracle.objective(problem.weight, oracle.dequantized(codes, grids), problem.hessian)
        for sweep in range(4):
            order = problem.by_size if sweep % 2 else None
            codes, changed = solve.refine_codes(
                problem.weight, problem.hessian, bits, codes, scale, zero_point, order=order
            )
            after = oracle.objective(problem.weight, oracle.dequantized(codes, grids), problem.hessian)
            assert np.all(after <= before + 1e-12 * before)
            assert changed > 0 or np.array_equal(after, before)
            before = after
        assert np.abs(codes.astype(int) * 2 + 1).max() < 2**bits
        settled, _ = solve.refine_codes(problem.weight, problem.hessian, bits, codes, scale, zero_point, sweeps=500)
        _, changed = solve.refine_codes(problem.weight, problem.hessian, bits, settled, scale, zero_point)
        assert changed == 0
        best = oracle.objective(problem.weight, oracle.dequantized(settled, grids), problem.hessian)
        for column in range(0, 96, 17):
            for step in (-1, 1):
                other = settled.astype(int)
                other[:, column] = np.clip(other[:, column] + step, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                worse = oracle.objective(problem.weight, oracle.dequantized(other, grids), problem.hessian)
                assert np.all(worse >= best * (1 - 0.01) - 1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["full", "dead", "rank"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_refitting_scales_solves_the_normal_equations(isa: str, symmetric: bool, kind: str, dtype: str) -> None:
    problem = oracle.Problem(51, 96, samples=30 if kind == "rank" else 400, dead=6 if kind == "dead" else 0, seed=8)
    for bits, size in ((2, 0), (3, 24), (4, 8)):
        codes, scale, zero_point = ops.quantize(problem.weight, bits, size, symmetric, dtype)
        scale[7] *= -1  # signs are kept
        grids = oracle.grids_from(scale, zero_point, bits)
        before = oracle.objective(problem.weight, oracle.dequantized(codes, grids), problem.hessian)
        found, changed = solve.refit_scales(problem.weight, problem.hessian, bits, codes, scale, zero_point)
        assert str(found.dtype) == dtype
        assert np.all(found * scale > 0)
        assert changed == np.any(found != scale, axis=1).sum() > 0
        grids = oracle.grids_from(found, zero_point, bits)
        after = oracle.objective(problem.weight, oracle.dequantized(codes, grids), problem.hessian)
        assert np.all(after <= before)
        if dtype == "float16" or kind == "rank" or (symmetric and bits == 2):
            continue
        for r in (0, 1, 20):
            levels = oracle.dequantized(codes, grids._replace(scale=np.ones_like(grids.scale)))[r]
            basis = np.zeros((96, found.shape[1]))
            for g in range(found.shape[1]):
                part = slice(g * (size or 96), (g + 1) * (size or 96))
                basis[part, g] = levels[part]
            h = problem.hessian.astype(float)
            best = np.linalg.lstsq(basis.T @ h @ basis, basis.T @ h @ problem.weight[r], rcond=None)[0]
            if np.all(best * scale[r] > 0):
                error = problem.weight[r] - basis @ best
                assert after[r] <= error @ h @ error * (1 + 1e-3) + 1e-9


def refusals() -> dict[str, tuple[Any, str]]:
    """Bad calls and what their sentences name."""
    problem = oracle.Problem(4, 8)
    w, u, h = problem.weight, problem.factor(problem.natural), problem.hessian
    codes, scale, _ = ops.quantize(w, 4, 4)
    hole = w.copy()
    hole[2, 3] = np.nan
    singular = u.copy()
    singular[3, 3] = 0
    twice = np.zeros(8, np.int32)
    return {
        "bits": (lambda: solve.gptq(w, u, 5), "num_bits 5"),
        "nan": (lambda: solve.gptq(hole, u, 4), "row 2 of weight holds NaN"),
        "double": (lambda: solve.gptq(w.astype(float), u, 4), "float64"),
        "factor": (lambda: solve.gptq(w, u[:4], 4), r"\[4, 8\]; expected \[8, 8\]"),
        "singular": (lambda: solve.gptq(w, singular, 4), r"factor\[3, 3\] is 0"),
        "order": (lambda: solve.gptq(w, u, 4, scale=scale, order=twice), "permutation"),
        "moving": (lambda: solve.gptq(w, u, 4, group_size=4, order=problem.natural), "static_scales"),
        "group": (lambda: solve.gptq(w, u, 4, group_size=3), "group_size 3 does not divide"),
        "scale": (lambda: solve.gptq(w, u, 4, scale=0 * scale), "expected a number that is not 0"),
        "negative": (lambda: solve.search_scales(w, -problem.diagonal, 4), "importance"),
        "blocks": (lambda: solve.search_scales(w, np.ones((2, 3, 3), np.float32), 4, 4), r"\[2, 4, 4\]"),
        "steps": (lambda: solve.search_scales(w, problem.diagonal, 4, steps=0), "0 steps"),
        "shrink": (lambda: solve.search_scales(w, problem.diagonal, 4, narrowest=0.0), "down to 0"),
        "dtype": (lambda: solve.search_scales(w, problem.diagonal, 4, 0, True, "float64"), "float64"),
        "codes": (lambda: solve.refine_codes(w, h, 2, codes, scale), "does not fit 2 bits"),
        "hessian": (lambda: solve.refine_codes(w, h[:, :4], 4, codes, scale), "expected"),
        "sweeps": (lambda: solve.refine_codes(w, h, 4, codes, scale, sweeps=-1), "-1 sweeps"),
        "step": (lambda: solve.prox_linf(w, -1.0), "step is -1"),
        "infinite": (lambda: solve.prox_linf(w / 0, 1.0), "NaN or infinity"),
        "radius": (lambda: solve.project_l1(w, float("nan")), "radius is nan"),
        "column": (
            lambda: solve.rounding_loss(w, h, 4, column_scale=np.zeros(8, np.float32)),
            r"column_scale\[0\] is 0",
        ),
        "gram": (lambda: solve.accumulate_gram(w, np.zeros((4, 4))), r"expected \[8, 8\]"),
        "integers": (lambda: solve.accumulate_gram(w, np.zeros((8, 8), np.int32)), "int32"),
    }


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("name", sorted(refusals()))
def test_bad_input_is_a_sentence(name: str) -> None:
    call, words = refusals()[name]
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert str(caught.value).endswith(".")
