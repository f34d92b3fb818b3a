"""qtale.ops on numpy arrays and torch tensors against float64 NumPy: all bits, groups, symmetry, dtypes, odd shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import operator_oracle as oracle
from qtale import _core, ops
from qtale.errors import InputError, UnsupportedError

BITS = (2, 3, 4, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# group size, in_features: K tails, sizes that are no multiple of 128, one scale per row of an odd width.
SHAPES = ((32, 96), (32, 160), (64, 576), (128, 256), (0, 77), (0, 1), (0, 130))


@pytest.fixture(params=_core.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn."""
    before = _core.cpu_isa()
    _core.set_cpu_isa(request.param)
    yield request.param
    _core.set_cpu_isa(before)


def double(array: Any) -> Any:
    if isinstance(array, torch.Tensor):
        return array.detach().double().numpy()
    return None if array is None else np.asarray(array, dtype=np.float64)


def weight_of(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(out_features * 1000 + in_features)
    return torch.randn(out_features, in_features).to(dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", BITS)
def test_quantize_rounds_to_nearest(isa: str, num_bits: int, symmetric: bool) -> None:
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    for dtype in DTYPES:
        for group, in_features in SHAPES:
            weight = weight_of(7, in_features, dtype)
            codes, scale, zero_point = ops.quantize(weight, num_bits, group, symmetric)
            groups = in_features // group if group else 1
            assert codes.shape == (7, in_features)
            assert scale.shape == (7, groups)
            assert scale.dtype == dtype
            assert (zero_point is None) == symmetric
            assert codes.min() >= low
            assert codes.max() <= high
            exact = oracle.scales(double(weight), num_bits, groups, symmetric)
            np.testing.assert_allclose(double(scale), exact, rtol=EPS[dtype])
            error = np.abs(oracle.dequantize(double(codes), double(scale), double(zero_point)) - double(weight))
            # A symmetric grid ends half a step before amax; a rounded scale moves each end by a part of amax.
            reach = np.abs(double(weight)).max() * (EPS[dtype] + 1e-6)
            assert (error <= oracle.spread(double(scale), in_features) / 2 + reach).all(), (dtype, group, in_features)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", BITS)
def test_dequantize_is_exact(isa: str, num_bits: int, symmetric: bool) -> None:
    for dtype in DTYPES:
        for group, in_features in SHAPES:
            codes, scale, zero_point = ops.quantize(weight_of(5, in_features, dtype), num_bits, group, symmetric)
            exact = oracle.dequantize(double(codes), double(scale), double(zero_point))
            for wanted in DTYPES:
                name = str(wanted).removeprefix("torch.")
                found = ops.dequantize(codes, scale, zero_point, name)
                assert found.dtype == wanted
                assert torch.equal(found, torch.from_numpy(exact).float().to(wanted))


@settings(max_examples=60, deadline=None)
@given(num_bits=st.sampled_from(BITS), rows=st.integers(0, 9), cols=st.integers(0, 70), seed=st.integers(0, 2**32 - 1))
def test_pack_is_the_little_endian_bit_stream_and_unpack_its_inverse(
    num_bits: int, rows: int, cols: int, seed: int
) -> None:
    half = 2 ** (num_bits - 1)
    codes = np.random.default_rng(seed).integers(-half, half, (rows, cols), dtype=np.int8)
    packed = ops.pack(codes, num_bits)
    np.testing.assert_array_equal(packed, oracle.pack(codes, num_bits))
    np.testing.assert_array_equal(ops.unpack(packed, num_bits, cols), codes)
    from_torch = ops.pack(torch.from_numpy(codes), num_bits)
    np.testing.assert_array_equal(from_torch.numpy(), packed)


@settings(max_examples=60, deadline=None)
@given(
    num_bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    rows=st.integers(1, 140),
    group=st.sampled_from([0, 32, 64, 96, 128]),
    blocks=st.integers(1, 5),
    isa_index=st.integers(0, 9),
)
def test_unprepack_is_the_inverse_of_prepack_on_every_instruction_set(
    num_bits: int, symmetric: bool, rows: int, group: int, blocks: int, isa_index: int
) -> None:
    isas, before = _core.cpu_isas(), _core.cpu_isa()
    codes, scale, zero_point = ops.quantize(weight_of(rows, group * blocks or 13 * blocks), num_bits, group, symmetric)
    try:
        _core.set_cpu_isa(isas[isa_index % len(isas)])
        prepacked = ops.prepack(codes, scale, zero_point, num_bits=num_bits)
    finally:
        _core.set_cpu_isa(before)
    back = ops.unprepack(prepacked)
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scale)
    assert back[2] is None if symmetric else torch.equal(back[2], zero_point)
    info = ops.prepacked_info(prepacked)
    assert (info["out_features"], info["in_features"], info["num_bits"]) == (*codes.shape, num_bits)


@pytest.mark.parametrize("compute", ["int8", "int16", "float"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", BITS)
def test_qmatmul_stays_within_its_stated_bound(isa: str, num_bits: int, symmetric: bool, compute: str) -> None:
    for group, in_features in SHAPES:
        codes, scale, zero_point = ops.quantize(weight_of(71, in_features), num_bits, group, symmetric)
        prepacked = ops.prepack(codes, scale, zero_point, num_bits=num_bits)
        weight = oracle.dequantize(double(codes), double(scale), double(zero_point))
        for dtype in DTYPES:
            bias = torch.randn(71).to(dtype)
            for rows in (1, 33):
                x = torch.randn(rows, in_features).to(dtype)
                y = ops.qmatmul(x, prepacked, 71, bias, compute)
                exact = double(x) @ weight.T + double(bias)
                bound = oracle.float_bound(double(x), double(codes), double(scale), double(zero_point), num_bits)
                if compute != "float":
                    bound = bound + oracle.rounding_bound(double(x), weight, compute)
                bound = bound + (np.abs(exact) + bound) * EPS[dtype] + 1e-6
                assert y.dtype == dtype
                assert (np.abs(double(y) - exact) <= bound).all(), (group, in_features, dtype, rows)


def test_float_is_more_exact_than_int8() -> None:
    codes, scale, _ = ops.quantize(weight_of(64, 512), 8, 128)
    prepacked, x = ops.prepack(codes, scale, num_bits=8), torch.randn(16, 512)
    exact = double(x) @ oracle.dequantize(double(codes), double(scale), None).T
    errors = {
        mode: np.abs(double(ops.qmatmul(x, prepacked, 64, None, mode)) - exact).max() for mode in ("int8", "float")
    }
    assert errors["float"] < 1e-4 < 1e-2 < errors["int8"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", BITS)
def test_fake_quantize_is_quantize_then_dequantize(isa: str, num_bits: int, symmetric: bool) -> None:
    for dtype in DTYPES:
        for group, in_features in SHAPES:
            weight = weight_of(6, in_features, dtype)
            codes, scale, zero_point = ops.quantize(weight, num_bits, group, symmetric)
            found = ops.fake_quantize(weight, scale, zero_point, num_bits=num_bits)
            expected = ops.dequantize(codes, scale, zero_point, str(dtype).removeprefix("torch."))
            assert found.dtype == dtype
            assert torch.equal(found, expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_numpy_and_torch_give_the_same(symmetric: bool) -> None:
    weight = weight_of(33, 128)
    x, bias = torch.randn(2, 3, 128), torch.randn(33)
    codes, scale, zero_point = ops.quantize(weight, 4, 32, symmetric)
    as_numpy = ops.quantize(weight.numpy(), 4, 32, symmetric)
    assert all(isinstance(array, np.ndarray) for array in as_numpy[:2])
    np.testing.assert_array_equal(as_numpy[0], codes.numpy())
    np.testing.assert_array_equal(as_numpy[1], scale.numpy())
    prepacked = ops.prepack(*as_numpy, num_bits=4)
    np.testing.assert_array_equal(prepacked, ops.prepack(codes, scale, zero_point, num_bits=4).numpy())
    np.testing.assert_array_equal(ops.dequantize(*as_numpy), ops.dequantize(codes, scale, zero_point).numpy())
    fake = ops.fake_quantize(weight.numpy(), *as_numpy[1:], num_bits=4)
    np.testing.assert_array_equal(fake, ops.fake_quantize(weight, scale, zero_point, num_bits=4).numpy())
    for compute in ("int8", "int16", "float"):
        y = ops.qmatmul(x.numpy(), prepacked, 33, bias.numpy(), compute)
        assert y.shape == (2, 3, 33)
        np.testing.assert_array_equal(y, ops.qmatmul(x, torch.from_numpy(prepacked), 33, bias, compute).numpy())
    np.testing.assert_array_equal(ops.unprepack(prepacked)[0], codes.numpy())


@pytest.mark.parametrize("compute", ["int8", "int16", "float"])
def test_qmatmul_takes_any_leading_dimensions_and_strides(compute: str) -> None:
    codes, scale, _ = ops.quantize(weight_of(20, 64), 4, 32)
    prepacked = ops.prepack(codes, scale, num_bits=4)
    x = torch.randn(3, 4, 64)
    y = ops.qmatmul(x, prepacked, 20, None, compute)
    assert torch.equal(ops.qmatmul(x[1, 2], prepacked, 20, None, compute), y[1, 2])
    assert torch.equal(ops.qmatmul(x.transpose(0, 1), prepacked, 20, None, compute), y.transpose(0, 1))
    wide = torch.randn(12, 100)
    wide[:, 20:84] = x.reshape(12, 64)
    assert torch.equal(ops.qmatmul(wide[:, 20:84], prepacked, 20, None, compute), y.reshape(12, 20))
    columns = x.reshape(12, 64).t().contiguous().t()
    assert torch.equal(ops.qmatmul(columns, prepacked, 20, None, compute), y.reshape(12, 20))
    assert ops.qmatmul(x[:0], prepacked, 20, None, compute).shape == (0, 4, 20)
    assert ops.qmatmul(x[:, :0], prepacked, 20, None, compute).shape == (3, 0, 20)


@pytest.mark.parametrize("compute", ["int8", "int16", "float"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_show_in_their_row_alone(isa: str, compute: str, value: float) -> None:
    codes, scale, _ = ops.quantize(weight_of(40, 256), 4, 128)
    prepacked, x = ops.prepack(codes, scale, num_bits=4), torch.randn(5, 256)
    clean = ops.qmatmul(x, prepacked, 40, None, compute)
    x[2, 17] = value
    y = ops.qmatmul(x, prepacked, 40, None, compute)
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], clean[others])
    assert not y[2].isfinite().any()


W, CODES = weight_of(8, 64), torch.zeros(8, 64, dtype=torch.int8)
SCALE = torch.ones(8, 2)
PREPACKED = ops.prepack(CODES, SCALE, num_bits=4)
REFUSED = {
    "bits": (lambda: ops.quantize(W, 5), "quantize: num_bits 5 is not supported; use 2, 3, 4 or 8"),
    "float64 weight": (lambda: ops.quantize(W.double(), 4), "float64"),
    "integer weight": (lambda: ops.quantize(CODES, 4), "expected float32, float16 or bfloat16"),
    "group": (lambda: ops.quantize(W, 4, 48), "group_size 48 does not divide in_features 64"),
    "vector": (lambda: ops.quantize(W[0], 4), r"quantize: weight has shape \[64\]; expected a matrix"),
    "scale dtype": (lambda: ops.quantize(W, 4, 0, True, "int8"), "scale_dtype 'int8' is not supported"),
    "nan": (lambda: ops.quantize(W * float("nan"), 4), "(?i)nan|infinite"),
    "inf": (lambda: ops.quantize(W / 0, 4), "(?i)nan|infinite"),
    "transposed": (lambda: ops.quantize(W.t(), 4), "not contiguous"),
    "a list": (lambda: ops.quantize([[1.0]], 4), "expected a torch tensor or a numpy array, got list"),
    "dequantize dtype": (lambda: ops.dequantize(CODES, SCALE, None, "float8"), "dtype 'float8' is not supported"),
    "scale shape": (lambda: ops.dequantize(CODES, torch.ones(8, 3)), r"scale has shape \[8, 3\]"),
    "zero_point dtype": (lambda: ops.dequantize(CODES, SCALE, SCALE), "zero_point is float32; expected int8"),
    "codes out of range": (lambda: ops.prepack(CODES + 9, SCALE, num_bits=4), "9"),
    "group of 16": (lambda: ops.prepack(CODES, torch.ones(8, 4), num_bits=4), "group_size of 16"),
    "unpack words": (lambda: ops.unpack(torch.zeros(2, 3, dtype=torch.int32), 4, 64), r"expected \[2, 8\]"),
    "unpack cols": (lambda: ops.unpack(torch.zeros(2, 3, dtype=torch.int32), 4, -1), "cols -1 is negative"),
    "x features": (lambda: ops.qmatmul(W[:, :32], PREPACKED, 8), "x has 32 features; the weight takes 64"),
    "x dtype": (lambda: ops.qmatmul(W.double(), PREPACKED, 8), "float64"),
    "x scalar": (lambda: ops.qmatmul(W[0, 0], PREPACKED, 8), "x is a scalar"),
    "compute": (lambda: ops.qmatmul(W, PREPACKED, 8, None, "int4"), "compute 'int4' is not a mode"),
    "out_features": (lambda: ops.qmatmul(W, PREPACKED, 9), r"expected \[8, 8\]"),
    "bias": (lambda: ops.qmatmul(W, PREPACKED, 8, torch.ones(7)), r"bias has shape \[7\]; expected \[8\]"),
    "not prepacked": (lambda: ops.qmatmul(W, PREPACKED[1:], 8), "prepack"),
    "truncated": (lambda: ops.unprepack(PREPACKED[:80].clone()), "80 bytes do not hold"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_in_a_sentence(case: str) -> None:
    call, sentence = REFUSED[case]
    with pytest.raises(InputError, match=sentence):
        call()


def test_tensors_that_the_core_cannot_address_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="use a dense tensor on the CPU"):
        ops.unprepack(PREPACKED.to("meta"))
    with pytest.raises(UnsupportedError, match="CPU"):
        ops.quantize(W.to_sparse(), 4)
    with pytest.raises(InputError, match="numpy has no bfloat16"):
        ops.quantize(W.numpy(), 4, 0, True, "bfloat16")
