"""ops.matmul and the ops on routed rows, with numpy arrays and torch tensors, against torch itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.library import opcheck

from qtale import _core, ops
from qtale.errors import InputError, UnsupportedError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=_core.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn."""
    before = _core.cpu_isa()
    _core.set_cpu_isa(request.param)
    yield request.param
    _core.set_cpu_isa(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 33, 130), (9, 64, 97), (13, 600, 50), (65, 77, 301)])
def test_matmul_is_within_its_bound(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, depth, outputs = shape
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, depth), torch.randn(outputs, depth).to(dtype), torch.randn(outputs)
    exact = x.double() @ weight.double().T + bias.double()
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    error = (ops.matmul(x, weight, bias).double() - exact).abs()
    assert bool((error <= (depth + 8) * 2.0**-24 * size).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_bfloat16_products_are_those_of_rounded_numbers(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, weight, bias = torch.randn(2, 37, 602), torch.randn(77, 602).to(dtype), torch.randn(77)
    if not _core.has_bfloat16():
        with pytest.raises(InputError, match=f"{isa} has no products of bfloat16 numbers"):
            ops.matmul(x, weight, bias, "bfloat16")
        return
    rounded, matrix = x.bfloat16().double(), weight.bfloat16().double()
    error = (ops.matmul(x, weight, bias, "bfloat16").double() - rounded @ matrix.T - bias.double()).abs()
    size = rounded.abs() @ matrix.abs().T + bias.double().abs()
    assert bool((error <= (602 + 8) * 2.0**-24 * size).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_of_a_batch_is_that_of_its_rows(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(4, 9, 576), torch.randn(100, 576).to(dtype)
    y = ops.matmul(x, weight)
    assert y.shape == (4, 9, 100)
    for i in range(4):
        assert torch.equal(ops.matmul(x[i], weight), y[i])
        assert torch.equal(ops.matmul(x[i, 5], weight), y[i, 5])


def test_numpy_and_torch_give_the_same_and_views_need_no_copies() -> None:
    x, weight, bias = torch.randn(40, 100)[:, 10:74], torch.randn(300, 100).half()[:, 20:84], torch.randn(300)
    y = ops.matmul(x, weight, bias)
    from_numpy = ops.matmul(x.numpy(), weight.numpy(), bias.numpy())
    assert isinstance(from_numpy, np.ndarray)
    np.testing.assert_array_equal(from_numpy, y.numpy())
    assert torch.equal(ops.matmul(x.contiguous(), weight.contiguous(), bias), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 16, 77])
def test_rows_go_out_and_come_back(isa: str, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    x, indices = torch.randn(50, size).to(dtype), torch.randperm(50)[:21].int()
    assert torch.equal(ops.compact_rows(x, indices), x[indices].float())
    stream, delta, gates = torch.randn(50, size), torch.randn(21, size), torch.randn(21)
    before = stream.clone()
    for gate in (None, gates):
        added = delta if gate is None else gate[:, None] * delta
        expected = before.index_add(0, indices, added)
        assert torch.equal(ops.scatter_add_rows(stream, delta, indices, gate), expected)
        arrays = [None if t is None else t.numpy() for t in (stream, delta, indices, gate)]
        np.testing.assert_array_equal(ops.scatter_add_rows(*arrays), expected.numpy())  # type: ignore[arg-type]
    assert torch.equal(stream, before)
    np.testing.assert_array_equal(ops.compact_rows(stream.numpy(), indices.numpy()), before[indices].numpy())


@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 1), (7, 33), (50, 64), (129, 17)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_routed_rows_are_those_of_the_masked_block(rows: int, size: int, share: float) -> None:
    torch.manual_seed(rows + size)
    x, weight, executed = torch.randn(rows, size), torch.randn(size, size), torch.rand(rows) < share
    x[::3] = -0.0
    before, seen = x.clone(), list[int]()

    def block(part: Any) -> Any:
        seen.append(len(part))
        part += 1
        return ops.matmul(part, weight if isinstance(part, torch.Tensor) else weight.numpy())

    found = ops.routed_rows(x, executed, block)
    expected = torch.where(executed[:, None], x + ops.matmul(x + 1, weight), x)
    torch.testing.assert_close(found, expected)
    # As bits, so that -0 is not 0.
    assert torch.equal(found[~executed].view(torch.int32), x[~executed].view(torch.int32))
    arrays = ops.routed_rows(x.numpy(), executed.numpy(), block)
    np.testing.assert_array_equal(arrays.view(np.int32), found.numpy().view(np.int32))
    assert torch.equal(x, before)
    assert found.data_ptr() != x.data_ptr() or not rows
    assert seen == ([int(executed.sum())] * 2 if executed.any() else [])


def test_nothing_in_nothing_out() -> None:
    none = torch.empty(0, dtype=torch.int32)
    x = torch.randn(5, 8)
    assert ops.matmul(torch.empty(0, 8), torch.randn(20, 8)).shape == (0, 20)
    assert ops.compact_rows(x, none).shape == (0, 8)
    assert torch.equal(ops.scatter_add_rows(x, torch.empty(0, 8), none), x)


def test_gradients_are_those_of_torch() -> None:
    torch.manual_seed(5)
    indices = torch.tensor([4, 0, 2], dtype=torch.int32)
    leaves = [torch.randn(6, 8), torch.randn(8, 8), torch.randn(8), torch.rand(3)]

    def by_qtale(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        delta = ops.matmul(ops.compact_rows(x, indices), weight, bias)
        return ops.scatter_add_rows(x, delta, indices, gates)  # type: ignore[no-any-return]

    def by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        delta = torch.nn.functional.linear(x[indices], weight, bias)
        return x.index_add(0, indices, gates[:, None] * delta)

    results = []
    for block in (by_qtale, by_torch):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        y = block(*inputs)
        y.square().sum().backward()  # type: ignore[no-untyped-call]
        results.append([y, *(leaf.grad for leaf in inputs)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_of_routed_rows_are_those_of_the_masked_block() -> None:
    torch.manual_seed(6)
    executed = torch.tensor([True, False, True, False])
    results = []
    for routed in (True, False):
        torch.manual_seed(7)
        x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
        if routed:
            y = ops.routed_rows(x, executed, lambda part, weight=weight: ops.matmul(part, weight))
        else:
            y = torch.where(executed[:, None], x + x @ weight.T, x)
        y.square().sum().backward()
        results.append((y, x.grad, weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_they_are_traced_and_compiled() -> None:
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    delta, gates = torch.randn(2, 8, requires_grad=True), torch.rand(2, requires_grad=True)
    indices = torch.tensor([5, 1], dtype=torch.int32)
    ops.matmul(x, weight)  # the first call with torch registers them
    calls: dict[str, tuple[Any, ...]] = {
        "matmul": (x, weight, None, "float"),
        "compact_rows": (x, indices),
        "scatter_add_rows": (x, delta, indices, gates),
    }
    for name, args in calls.items():
        assert set(opcheck(getattr(torch.ops.qtale, name).default, args).values()) == {"SUCCESS"}

    def block(x: torch.Tensor) -> torch.Tensor:
        active = ops.matmul(torch.sin(ops.compact_rows(x, indices)), weight)
        return ops.scatter_add_rows(x, active, indices)  # type: ignore[no-any-return]

    assert torch.equal(torch.compile(block, backend="aot_eager", fullgraph=True)(x), block(x))


def unchanged(part: Any) -> Any:
    return part


X, WEIGHT, TWO = torch.randn(4, 8), torch.randn(20, 8), torch.tensor([0, 3], dtype=torch.int32)
REFUSED: dict[str, tuple[Any, str]] = {
    "depths": (lambda: ops.matmul(X[:, :5], WEIGHT), "matmul: x has 5 features; the weight takes 8"),
    "x dtype": (lambda: ops.matmul(X.half(), WEIGHT), "x is float16; expected float32"),
    "weight dtype": (lambda: ops.matmul(X, WEIGHT.double()), "weight is float64; expected float32, float16"),
    "scalar": (lambda: ops.matmul(X[0, 0], WEIGHT), "x is a scalar"),
    "transposed": (lambda: ops.matmul(X, torch.randn(8, 20).t()), "the rows of weight are not contiguous"),
    "bias": (lambda: ops.matmul(X, WEIGHT, torch.randn(19)), r"bias has shape \[19\]; expected \[20\]"),
    "compute": (lambda: ops.matmul(X, WEIGHT, None, "int8"), "compute 'int8' is not a mode; use 'float' or 'bfloat16'"),
    "a list": (lambda: ops.matmul([[1.0]], WEIGHT), "expected a torch tensor or a numpy array, got list"),
    "index": (lambda: ops.compact_rows(X, TWO + 1), "index 4 at place 1 is not a row of x; expected 0 to 3"),
    "index dtype": (lambda: ops.compact_rows(X, TWO.long()), "indices is int64; expected int32"),
    "index matrix": (lambda: ops.compact_rows(X, TWO[None]), r"indices has shape \[1, 2\]; expected a vector"),
    "twice": (lambda: ops.scatter_add_rows(X, X[:2], TWO * 0), "index 0 stands twice, again at place 1"),
    "width": (lambda: ops.scatter_add_rows(X, X[:2, :5], TWO), "rows of delta have 5 elements, those of x 8"),
    "count": (lambda: ops.scatter_add_rows(X, X[:3], TWO), r"indices has shape \[2\]; expected \[3\]"),
    "gates": (lambda: ops.scatter_add_rows(X, X[:2], TWO, X[0]), r"gates has shape \[8\]; expected \[2\]"),
    "routed vector": (lambda: ops.routed_rows(X[0], X[0] > 0, unchanged), r"x is float32 \[8\] in torch; expected"),
    "routed half": (lambda: ops.routed_rows(X.half(), X[:, 0] > 0, unchanged), "x is float16 .* expected float32"),
    "routed list": (lambda: ops.routed_rows(X, [True] * 4, unchanged), "expected a torch tensor or a numpy array"),
    "routed places": (lambda: ops.routed_rows(X, TWO, unchanged), r"executed is int32 \[2\] .* bool \[4\] in torch"),
    "routed mask": (lambda: ops.routed_rows(X, X > 0, unchanged), r"executed is bool \[4, 8\] in torch; expected bool"),
    "routed kinds": (lambda: ops.routed_rows(X, np.ones(4, bool), unchanged), r"in numpy; expected bool \[4\]"),
    "update": (lambda: ops.routed_rows(X, X[:, 0] == X[:, 0], lambda part: part[:2]), r"block returned is .* \[2, 8\]"),
    "integers": (lambda: ops.scatter_add_rows(X.int(), X[:2], TWO), "x is int32; expected float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_in_a_sentence(case: str) -> None:
    call, sentence = REFUSED[case]
    with pytest.raises(InputError, match=sentence):
        call()


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="CPU"):
        ops.matmul(X.to_sparse(), WEIGHT)
