"""qtale.solve's smaller steps on every instruction set: proximal steps, the loss of rounding, Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import solve_oracle as oracle
from qtale import _core, ops, solve
from qtale.errors import InputError
from qtale.ptq import products
from qtale.ptq.moments import Moments


@pytest.fixture(params=_core.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn."""
    before = _core.cpu_isa()
    _core.set_cpu_isa(request.param)
    yield request.param
    _core.set_cpu_isa(before)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 4),
    groups=st.integers(1, 3),
    size=st.integers(1, 70),
    step=st.floats(0, 50, width=32),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_the_proximal_step_meets_its_optimality_condition(
    rows: int, groups: int, size: int, step: float, seed: int, spread: float
) -> None:
    random = np.random.default_rng(seed)
    v = (random.standard_t(3, size=(rows, groups * size)) * spread).astype(np.float32)
    x = solve.prox_linf(v, step, size if groups > 1 else 0)
    inside = solve.project_l1(v, step, size if groups > 1 else 0)
    np.testing.assert_allclose(x + inside, v, rtol=1e-6, atol=1e-6 * spread)
    for r in range(rows):
        for k in range(0, groups * size, size):
            part, result = v[r, k : k + size].astype(float), x[r, k : k + size].astype(float)
            top, given_up = np.abs(result).max(), part - result
            # 0 in x - v + step * d||x||_inf: what is given up has l1 norm `step`, with the signs of x where |x| is top.
            slack = 2e-6 * (np.abs(part).sum() + step)
            if top > 0:
                assert abs(np.abs(given_up).sum() - step) <= slack
                assert np.all(given_up[np.abs(result) < top] == 0)
                assert np.all(given_up * result >= 0)
            else:
                assert np.abs(part).sum() <= step + slack
            assert np.abs(inside[r, k : k + size]).sum() <= step + slack


def test_prox_of_every_set_agrees_with_sorting(isa: str) -> None:
    random = np.random.default_rng(1)
    for size in (1, 3, 16, 129, 1000):
        v = random.normal(size=(7, size)).astype(np.float32)
        for step in (0.0, 1e-4, 0.3, 5.0, 1e6):
            magnitudes = -np.sort(-np.abs(v.astype(float)), axis=1)
            candidates = (np.cumsum(magnitudes, axis=1) - step) / np.arange(1, size + 1)
            threshold = np.maximum(candidates.max(axis=1), 0)[:, None]
            np.testing.assert_allclose(solve.prox_linf(v, step), np.clip(v, -threshold, threshold), atol=2e-6)


@pytest.mark.parametrize("group", [0, 12])
def test_rounding_loss_is_the_trace(isa: str, group: int) -> None:
    problem = oracle.Problem(33, 132, seed=7)
    s = np.random.default_rng(0).lognormal(size=132).astype(np.float32)
    for bits, symmetric in ((4, True), (3, False)):
        for factor in (None, s):
            scaled = problem.weight * (1 if factor is None else factor)
            codes, scale, zero_point = ops.quantize(scaled, bits, group, symmetric)
            q = oracle.dequantized(codes, oracle.grids_from(scale, zero_point, bits)) / (
                1 if factor is None else factor
            )
            expected = oracle.objective(problem.weight, q, problem.hessian).sum()
            upper = np.triu(problem.hessian) + np.tril(np.full_like(problem.hessian, 7.0), -1)
            found = solve.rounding_loss(problem.weight, upper, bits, group, symmetric, column_scale=factor)
            assert found == pytest.approx(expected, rel=2e-3 if bits == 8 else 1e-4)


def test_gram_takes_bfloat16(isa: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for n, columns in ((0, 5), (33, 70), (1500, 61)):
        x = torch.randn(n, columns + 3, generator=generator).bfloat16()[:, :columns]
        weights = torch.rand(n, generator=generator)
        for dtype in (torch.float64, torch.float32):
            for row_weight in (None, weights):
                gram = torch.ones(columns, columns, dtype=dtype)
                solve.accumulate_gram(x, gram, row_weight)
                exact, w = x.double(), torch.ones(n).double() if row_weight is None else weights.double()
                bound = 1100 * 2.0**-24 * ((exact.abs().T * w) @ exact.abs() + 1)
                assert bool(((gram - 1 - (exact.T * w) @ exact).abs().triu() <= bound).all())
                assert torch.equal(gram.tril(-1), torch.ones_like(gram).tril(-1))
    for wrong in (torch.float16, torch.int8):
        with pytest.raises(InputError, match="expected float32 or bfloat16"):
            solve.accumulate_gram(torch.ones(2, 3).to(wrong), torch.zeros(3, 3))


@pytest.mark.parametrize("size", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_give_the_mean_of_squares(size: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    moments, rows = Moments(size), torch.randn(40, size, generator=generator)
    weight = torch.rand(40, generator=generator) + 0.1 if weighted else None
    assert torch.equal(moments.hessian(), torch.zeros(size, size))
    moments.add(rows[:30], None if weight is None else weight[:30])
    moments.add(rows[30:], None if weight is None else weight[30:])
    found, w = moments.hessian(), torch.ones(40).double() if weight is None else weight.double()
    expected = (rows.double().T * w) @ rows.double() / w.sum()
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_sums_are_of_what_products_round_to_where_that_is_faster() -> None:
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(products.to_sum(rows, "float32"), rows)
    amx = "avx512_amx" in _core.cpu_isas()
    expected = rows.bfloat16() if amx else rows
    assert torch.equal(products.to_sum(rows, "bfloat16"), expected)
    assert products.to_sum(rows, "auto").dtype == expected.dtype


def test_gram_sums_the_upper_triangle(isa: str) -> None:
    random = np.random.default_rng(2)
    for n, columns in ((0, 5), (1, 1), (3, 130), (1500, 61), (2100, 9)):
        x = random.normal(size=(n, columns + 3)).astype(np.float32)[:, :columns]
        weights = random.uniform(size=n).astype(np.float32)
        for dtype in (np.float64, np.float32):
            for row_weight in (None, weights):
                gram = np.ones((columns, columns), dtype)
                solve.accumulate_gram(x, gram, row_weight)
                w = np.ones(n) if row_weight is None else weights.astype(float)
                exact = (x.astype(float).T * w) @ x.astype(float)
                bound = 1100 * 2.0**-24 * ((np.abs(x.astype(float)).T * w) @ np.abs(x.astype(float)) + 1)
                error = np.abs(gram - 1 - exact)
                assert np.all(np.triu(error) <= bound)
                assert np.all(np.tril(gram, -1) == np.tril(np.ones_like(gram), -1))
