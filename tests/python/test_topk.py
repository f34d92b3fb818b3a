"""ops.project_topk and ops.jaccard on numpy arrays and torch tensors, against torch.topk and Python sets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from qtale import _core, ops
from qtale.errors import InputError, UnsupportedError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = torch.ops.qtale


@pytest.fixture(params=_core.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn."""
    before = _core.cpu_isa()
    _core.set_cpu_isa(request.param)
    yield request.param
    _core.set_cpu_isa(before)


def integers(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small integers: sums in any order are exact, and equal products are frequent."""
    generator = torch.Generator().manual_seed(1000 * rows + cols)
    return torch.randint(-4, 5, (rows, cols), generator=generator).to(dtype)


def exact_topk(x: torch.Tensor, matrix: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By a stable sort of all products, so that the smaller of two indices comes first."""
    values, indices = torch.sort(x @ matrix.float().T, dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k].int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 33, 130), (9, 64, 97), (13, 40, 200), (65, 77, 301)])
def test_project_topk_is_the_sorted_product(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, depth, entries = shape
    x, matrix = integers(rows, depth), integers(entries, depth, dtype)
    for k in (1, 10, entries - 1, entries):
        values, indices = ops.project_topk(x, matrix, k)
        assert (values.dtype, indices.dtype) == (torch.float32, torch.int32)
        expected = exact_topk(x, matrix, k)
        assert torch.equal(values, expected[0])
        assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 50])
def test_project_topk_agrees_with_torch_topk(isa: str, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, matrix = torch.randn(rows, 576), torch.randn(800, 576).to(dtype)
    values, indices = ops.project_topk(x, matrix, 20)
    products = x.double() @ matrix.double().T
    expected = torch.topk(products, 20).values
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(products.gather(1, indices.long()), expected, rtol=1e-5, atol=1e-4)
    assert all(len(set(row)) == 20 for row in indices.tolist())


def test_numpy_and_torch_give_the_same_and_views_need_no_copies() -> None:
    x, matrix = torch.randn(40, 100)[:, 10:74], torch.randn(300, 100).half()[:, 20:84]
    values, indices = ops.project_topk(x, matrix, 7)
    from_numpy = ops.project_topk(x.numpy(), matrix.numpy(), 7)
    assert all(isinstance(array, np.ndarray) for array in from_numpy)
    np.testing.assert_array_equal(from_numpy[0], values.numpy())
    np.testing.assert_array_equal(from_numpy[1], indices.numpy())
    copied = ops.project_topk(x.contiguous(), matrix.contiguous(), 7)
    assert torch.equal(copied[0], values)
    assert torch.equal(copied[1], indices)


def test_threads_do_not_change_a_bit() -> None:
    x, matrix, before = torch.randn(33, 200), torch.randn(4000, 200), _core.num_threads()
    try:
        _core.set_num_threads(1)
        one = ops.project_topk(x, matrix, 50)
        _core.set_num_threads(3)
        three = ops.project_topk(x, matrix, 50)
    finally:
        _core.set_num_threads(before)
    assert torch.equal(one[0], three[0])
    assert torch.equal(one[1], three[1])


def test_nothing_in_nothing_out() -> None:
    values, indices = ops.project_topk(torch.empty(0, 8), torch.randn(20, 8), 3)
    assert values.shape == indices.shape == (0, 3)
    assert ops.jaccard(torch.empty(0, 3, dtype=torch.int32), torch.empty(0, 4, dtype=torch.int32)).shape == (0,)


def jaccard_of_sets(a: list[int], b: list[int]) -> float:
    left, right = set(a), set(b)
    return len(left & right) / len(left | right) if left | right else 1.0


ROWS = st.integers(0, 12).flatmap(
    lambda size: st.lists(st.lists(st.integers(-3, 12), min_size=size, max_size=size), min_size=4, max_size=4)
)


@settings(max_examples=80, deadline=None)
@given(a=ROWS, b=ROWS, isa_index=st.integers(0, 9))
def test_jaccard_is_that_of_sets(a: list[list[int]], b: list[list[int]], isa_index: int) -> None:
    isas, before = _core.cpu_isas(), _core.cpu_isa()
    left, right = (np.array(rows, dtype=np.int32).reshape(4, -1) for rows in (a, b))
    try:
        _core.set_cpu_isa(isas[isa_index % len(isas)])
        found = ops.jaccard(left, right)
        from_torch = ops.jaccard(torch.from_numpy(left), torch.from_numpy(right))
    finally:
        _core.set_cpu_isa(before)
    assert found.dtype == np.float64
    assert found.tolist() == [jaccard_of_sets(*pair) for pair in zip(a, b, strict=True)]
    assert from_torch.dtype == torch.float64
    assert from_torch.tolist() == found.tolist()


def test_token_sets_are_traced_compiled_and_without_gradients() -> None:
    x, matrix = torch.randn(5, 16, requires_grad=True), torch.nn.Parameter(torch.randn(30, 16))
    before = ops.project_topk(x, matrix, 4)
    assert not any(tensor.requires_grad for tensor in before)
    sets = before[1]
    for operator, *args in ((OPS.project_topk.default, x, matrix, 4), (OPS.jaccard.default, sets, sets)):
        assert set(opcheck(operator, tuple(args)).values()) == {"SUCCESS"}

    def overlap(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        left, right = (ops.project_topk(torch.sin(part), matrix, 4)[1] for part in (x, y))
        return 1 - ops.jaccard(left, right)

    y = torch.randn(5, 16)
    compiled = torch.compile(overlap, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, y), overlap(x, y))
    values, indices = ops.project_topk(torch.empty(5, 16, device="meta"), torch.empty(30, 16, device="meta"), 4)
    assert (values.shape, indices.shape, indices.dtype) == ((5, 4), (5, 4), torch.int32)


X, MATRIX, SETS = torch.randn(4, 8), torch.randn(20, 8), torch.zeros(4, 3, dtype=torch.int32)
NAN = torch.full((1, 8), float("nan"))
REFUSED: dict[str, tuple[Any, str]] = {
    "k of 0": (lambda: ops.project_topk(X, MATRIX, 0), "k is 0, but the matrix has 20 rows; use a k from 1"),
    "negative k": (lambda: ops.project_topk(X, MATRIX, -3), "k is -3"),
    "k above vocab": (lambda: ops.project_topk(X.numpy(), MATRIX.numpy(), 21), "k is 21, but the matrix has 20 rows"),
    "no vocab": (lambda: ops.project_topk(X, MATRIX[:0], 1), "k is 1, but the matrix has 0 rows"),
    "depths": (lambda: ops.project_topk(X[:, :5], MATRIX, 3), "x has 5 features, the matrix 8"),
    "x dtype": (lambda: ops.project_topk(X.half(), MATRIX, 3), "x is float16; expected float32"),
    "float64": (lambda: ops.project_topk(X, MATRIX.double(), 3), "matrix is float64; expected float32, float16"),
    "vector": (lambda: ops.project_topk(X[0], MATRIX, 3), r"x has shape \[8\]; expected a matrix"),
    "transposed": (lambda: ops.project_topk(X, torch.randn(8, 20).t(), 3), "matrix are not contiguous"),
    "nan in x": (lambda: ops.project_topk(torch.cat([X, NAN, X]), MATRIX, 3), "row 4 of x times row 0 of the matrix"),
    "nan in matrix": (
        lambda: ops.project_topk(X, torch.cat([MATRIX, NAN]), 3),
        "row 0 of x times row 20 of the matrix",
    ),
    "a list": (lambda: ops.project_topk([[1.0]], MATRIX, 1), "expected a torch tensor or a numpy array, got list"),
    "index dtype": (lambda: ops.jaccard(SETS, SETS.long()), "jaccard: b is int64; expected int32"),
    "rows": (lambda: ops.jaccard(SETS, SETS[:3]), "a has 4 rows, b 3"),
    "index vector": (lambda: ops.jaccard(SETS[0], SETS), r"a has shape \[3\]; expected a matrix"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_in_a_sentence(case: str) -> None:
    call, sentence = REFUSED[case]
    with pytest.raises(InputError, match=sentence):
        call()


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="CPU"):
        ops.project_topk(X.to_sparse(), MATRIX, 3)
