"""torch.ops.qtale: traced, compiled, differentiated, and refusing devices that have no kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.library import opcheck

from qtale import ops
from qtale.errors import UnsupportedError

OPS = torch.ops.qtale


def packed(
    num_bits: int = 4, group: int = 32, symmetric: bool = True, shape: tuple[int, int] = (40, 96)
) -> tuple[torch.Tensor, torch.Tensor]:
    """A prepacked weight and the float32 matrix that it stands for."""
    torch.manual_seed(3)
    codes, scale, zero_point = ops.quantize(torch.randn(shape), num_bits, group, symmetric)
    return ops.prepack(codes, scale, zero_point, num_bits=num_bits), ops.dequantize(codes, scale, zero_point)


def inputs() -> dict[str, tuple[Any, ...]]:
    torch.manual_seed(1)
    weight = torch.randn(40, 96)
    codes, scale, zero_point = ops.quantize(weight, 3, 32, False)
    prepacked, _ = packed()
    bias = torch.randn(40, requires_grad=True)
    x = torch.randn(2, 3, 96, requires_grad=True)
    return {
        "quantize": (OPS.quantize.default, weight, 4, 32, True, None),
        "quantize asymmetric": (OPS.quantize.default, weight, 8, 0, False, torch.float16),
        "dequantize": (OPS.dequantize.default, codes, scale, zero_point, None),
        "dequantize to bf16": (OPS.dequantize.default, codes, scale, None, torch.bfloat16),
        "pack": (OPS.pack.default, codes, 3),
        "unpack": (OPS.unpack.default, ops.pack(codes, 3), 3, 96),
        "prepack": (OPS.prepack.default, codes, scale, zero_point, 3),
        "qmatmul": (OPS.qmatmul.default, x, prepacked, 40, bias, "int8"),
        "qmatmul float": (OPS.qmatmul.default, x.detach(), prepacked, 40, None, "float"),
        "qmatmul of a vector": (OPS.qmatmul.default, torch.randn(96), prepacked, 40, None, "int8"),
        "qmatmul of nothing": (OPS.qmatmul.default, torch.randn(2, 0, 96), prepacked, 40, None, "int8"),
        "qmatmul of permuted rows": (
            OPS.qmatmul.default,
            torch.randn(96, 5, 3).permute(1, 2, 0).requires_grad_(),
            prepacked,
            40,
            None,
            "int8",
        ),
        "qmatmul bfloat16": (OPS.qmatmul.default, x.detach().bfloat16().requires_grad_(), prepacked, 40, None, "float"),
        "qmatmul_input_grad": (OPS.qmatmul_input_grad.default, torch.randn(3, 40, requires_grad=True), prepacked, 96),
        "fake_quantize": (OPS.fake_quantize.default, weight.requires_grad_(), scale, zero_point, 3),
    }


@pytest.mark.parametrize("case", inputs())
def test_opcheck(case: str) -> None:
    operator, *args = inputs()[case]
    results = opcheck(operator, tuple(args))
    assert set(results.values()) == {"SUCCESS"}


# Inductor needs a C++ compiler at run time and seconds for each graph: one case of it is enough.
@pytest.mark.parametrize(
    ("backend", "compute"),
    [("aot_eager", "int8"), ("aot_eager", "int16"), ("aot_eager", "float"), ("inductor", "int8")],
)
def test_compile_without_graph_breaks(backend: str, compute: str) -> None:
    prepacked, _ = packed()
    bias = torch.randn(40, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        return ops.qmatmul(torch.sin(x), prepacked, 40, bias, compute).relu() * 2

    compiled: Callable[..., torch.Tensor] = torch.compile(block, fullgraph=True, backend=backend)
    for rows in (3, 7):
        grads = []
        for function in (compiled, block):
            x = torch.arange(rows * 96.0).reshape(rows, 96).requires_grad_()
            y = function(x)
            y.sum().backward()
            assert x.grad is not None
            grads.append((y.detach(), x.grad))
        torch.testing.assert_close(grads[0], grads[1])


def test_quantization_compiles_too() -> None:
    def round_trip(weight: torch.Tensor) -> torch.Tensor:
        codes, scale, zero_point = ops.quantize(weight, 4, 32, False)
        packed_codes = ops.pack(codes, 4)
        return ops.dequantize(ops.unpack(packed_codes, 4, 64), scale, zero_point) + 0  # type: ignore[no-any-return]

    weight = torch.randn(16, 64)
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), round_trip(weight))


@pytest.mark.parametrize("compute", ["int8", "int16", "float"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_gradients_are_those_of_the_dequantized_weight(num_bits: int, symmetric: bool, compute: str) -> None:
    prepacked, weight = packed(num_bits, 32, symmetric)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        x = torch.randn(2, 5, 96).to(dtype).requires_grad_()
        bias = torch.randn(40).to(dtype).requires_grad_()
        upstream = torch.randn(2, 5, 40).to(dtype)
        ops.qmatmul(x, prepacked, 40, bias, compute).backward(upstream)
        assert x.grad is not None
        assert bias.grad is not None
        assert (x.grad.dtype, bias.grad.dtype) == (dtype, dtype)
        exact = upstream.double() @ weight.double()
        assert (x.grad.double() - exact).abs().max() <= tolerance * exact.abs().max()
        expected = upstream.double().sum((0, 1))
        assert (bias.grad.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")
def test_gradcheck_of_the_float_path() -> None:
    prepacked, _ = packed(8, 0, shape=(5, 7))
    x = torch.randn(3, 7, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)

    def product(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.qmatmul(x, prepacked, 5, bias, "float")  # type: ignore[no-any-return]

    # The kernels stop at float32, so the steps are large; the function is linear, which makes them exact.
    assert torch.autograd.gradcheck(product, (x, bias), eps=0.5, atol=1e-4, rtol=1e-4)
    assert torch.autograd.gradgradcheck(product, (x, bias), eps=0.5, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_quantize_passes_gradients_straight_through_inside_the_range(symmetric: bool) -> None:
    x = torch.linspace(-3, 3, 64).reshape(2, 32).requires_grad_()
    scale = torch.full((2, 1), 0.25)
    zero_point = None if symmetric else torch.full((2, 1), 3, dtype=torch.int8)
    upstream = torch.randn(2, 32)
    ops.fake_quantize(x, scale, zero_point, num_bits=4).backward(upstream)
    shift = 0 if symmetric else 3
    code = (x.detach() / 0.25).round() + shift
    inside = (code >= -8) & (code <= 7)
    assert inside.any()
    assert not inside.all()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(inside, upstream, 0))


def test_no_gradient_is_made_where_none_is_asked_for_or_defined() -> None:
    prepacked, _ = packed()
    weight = torch.nn.Parameter(torch.randn(4, 64))
    assert not any(tensor.requires_grad for tensor in ops.quantize(weight, 4, 32, False))
    assert not ops.qmatmul(torch.randn(2, 96), prepacked, 40).requires_grad
    with torch.no_grad():
        assert not ops.qmatmul(torch.randn(2, 96, requires_grad=True), prepacked, 40).requires_grad
    with torch.inference_mode():
        assert ops.qmatmul(torch.randn(2, 96), prepacked, 40).shape == (2, 40)


def test_meta_tensors_give_shapes() -> None:
    codes, scale, zero_point = ops.quantize(torch.empty(16, 64, device="meta"), 4, 32, False)
    assert (codes.shape, scale.shape, zero_point.shape) == ((16, 64), (16, 2), (16, 2))
    prepacked = ops.prepack(codes, scale, zero_point, num_bits=4)
    real = ops.prepack(*ops.quantize(torch.randn(16, 64), 4, 32, False), num_bits=4)
    assert (prepacked.shape, prepacked.device.type) == (real.shape, "meta")
    assert ops.qmatmul(torch.empty(3, 64, device="meta"), prepacked, 16).shape == (3, 16)


def test_devices_without_kernels_are_refused() -> None:
    # A CUDA tensor cannot be made here; the kernel that its dispatch key reaches can be called.
    keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    prepacked, _ = packed()
    with pytest.raises(UnsupportedError, match=r"qmatmul: has no kernel for tensors on cpu, because .* the CPU"):
        OPS.qmatmul.default.redispatch(keyset, torch.randn(2, 96), prepacked, 40, None, "int8")
