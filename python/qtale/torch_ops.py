"""``torch.ops.qtale``: the operators for torch tensors, with shapes for tracing and formulas for autograd.

Defined through ``torch.library.Library``, whose calls cost a fraction of ``torch.library.custom_op``'s. Importing this
module registers them; :mod:`qtale.ops` imports it with the first torch tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from qtale import _core, kernels
from qtale.errors import InputError, UnsupportedError
from qtale.tensors import torch_dtype_name

F = TypeVar("F", bound=Callable[..., Any])

_SCHEMAS = (
    "quantize(Tensor weight, int num_bits, int group_size, bool symmetric, ScalarType? scale_dtype)"
    " -> (Tensor codes, Tensor scale, Tensor zero_point)",
    "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, ScalarType? dtype) -> Tensor",
    "pack(Tensor codes, int num_bits) -> Tensor",
    "unpack(Tensor packed, int num_bits, SymInt cols) -> Tensor",
    "prepack(Tensor codes, Tensor scale, Tensor? zero_point, int num_bits) -> Tensor",
    "qmatmul(Tensor x, Tensor prepacked, SymInt out_features, Tensor? bias, str compute) -> Tensor",
    "qmatmul_input_grad(Tensor grad, Tensor prepacked, SymInt in_features) -> Tensor",
    "fake_quantize(Tensor x, Tensor scale, Tensor? zero_point, int num_bits) -> Tensor",
    "project_topk(Tensor x, Tensor matrix, SymInt k) -> (Tensor values, Tensor indices)",
    "jaccard(Tensor a, Tensor b) -> Tensor",
)

# No defaults: :mod:`qtale.ops` alone has them.
_library: Any = torch.library.Library("qtale", "DEF")  # type: ignore[no-untyped-call]
for _schema in _SCHEMAS:
    _library.define(_schema)


def _impl(name: str) -> Callable[[F], F]:
    """Registers the CPU kernel of an operator, and a refusal for every other device."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        devices = sorted({str(arg.device) for arg in args if isinstance(arg, Tensor)})
        raise UnsupportedError(
            f"{name}: has no kernel for tensors on {' and '.join(devices)}, because "
            f"{_core.build_info()['cuda_reason']}; move all of them to the CPU."
        )

    def register(function: F) -> F:
        _library.impl(name, function, "CPU")
        _library.impl(name, refuse, "CompositeExplicitAutograd")
        return function

    return register


def _fake(name: str) -> Callable[[F], F]:
    return cast("Callable[[F], F]", torch.library.register_fake(f"qtale::{name}", lib=_library))


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else torch_dtype_name(dtype)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


# quantize


def quantize(
    weight: Tensor, num_bits: int, group_size: int, symmetric: bool, scale_dtype: str | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`qtale.ops.quantize`."""
    codes, scale, zero_point = torch.ops.qtale.quantize.default(
        weight, num_bits, group_size, symmetric, _dtype(scale_dtype)
    )
    return codes, scale, None if symmetric else zero_point


# A schema cannot return an optional tensor: symmetric weights give a zero_point of no columns.
@_impl("quantize")
def _quantize(
    weight: Tensor, num_bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, zero_point = kernels.quantize(weight, num_bits, group_size, symmetric, _name(scale_dtype))
    return codes, scale, codes.new_empty((codes.shape[0], 0)) if zero_point is None else zero_point


@_fake("quantize")
def _quantize_fake(
    weight: Tensor, num_bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    out_features, in_features = weight.shape
    groups = kernels.group_count(in_features, group_size)
    codes = weight.new_empty((out_features, in_features), dtype=torch.int8)
    scale = weight.new_empty((out_features, groups), dtype=scale_dtype or weight.dtype)
    return codes, scale, codes.new_empty((out_features, 0 if symmetric else groups))


# dequantize


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str | None) -> Any:
    """:func:`qtale.ops.dequantize`."""
    return torch.ops.qtale.dequantize.default(codes, scale, zero_point, _dtype(dtype))


@_impl("dequantize")
def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype | None) -> Any:
    return kernels.dequantize(codes, scale, zero_point, _name(dtype))


@_fake("dequantize")
def _dequantize_fake(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype or scale.dtype, device=codes.device)


# pack, unpack, prepack


def pack(codes: Tensor, num_bits: int) -> Any:
    """:func:`qtale.ops.pack`."""
    return torch.ops.qtale.pack.default(codes, num_bits)


def unpack(packed: Tensor, num_bits: int, cols: int) -> Any:
    """:func:`qtale.ops.unpack`."""
    return torch.ops.qtale.unpack.default(packed, num_bits, cols)


def prepack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, num_bits: int) -> Any:
    """:func:`qtale.ops.prepack`."""
    return torch.ops.qtale.prepack.default(codes, scale, zero_point, num_bits)


_impl("pack")(kernels.pack)
_impl("unpack")(kernels.unpack)


@_impl("prepack")
def _prepack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> Any:
    return kernels.prepack(codes, scale, zero_point, num_bits=num_bits)


@_fake("pack")
def _pack_fake(codes: Tensor, num_bits: int) -> Tensor:
    rows, cols = codes.shape
    return codes.new_empty((rows, (cols * num_bits + 31) // 32), dtype=torch.int32)


@_fake("unpack")
def _unpack_fake(packed: Tensor, num_bits: int, cols: int) -> Tensor:
    return packed.new_empty((packed.shape[0], cols), dtype=torch.int8)


@_fake("prepack")
def _prepack_fake(codes: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> Tensor:
    # The layout's size is no formula of the shapes: tracing takes them as constants.
    out_features, in_features = (int(size) for size in codes.shape)
    groups, dtype = int(scale.shape[1]), torch_dtype_name(scale.dtype)
    size = _core.prepacked_bytes(out_features, in_features, groups, num_bits, zero_point is None, dtype)
    return codes.new_empty((size,), dtype=torch.uint8)


# qmatmul


def qmatmul(x: Tensor, prepacked: Tensor, out_features: int, bias: Tensor | None, compute: str) -> Any:
    """:func:`qtale.ops.qmatmul`."""
    return torch.ops.qtale.qmatmul.default(x, prepacked, out_features, bias, compute)


_impl("qmatmul")(kernels.qmatmul)


@_fake("qmatmul")
def _qmatmul_fake(x: Tensor, prepacked: Tensor, out_features: int, bias: Tensor | None, compute: str) -> Tensor:
    if x.device != prepacked.device:
        raise InputError(f"qmatmul: x is on {x.device}, the weight on {prepacked.device}; move them to one device.")
    return x.new_empty((*x.shape[:-1], out_features))


@_impl("qmatmul_input_grad")
def _qmatmul_input_grad(grad: Tensor, prepacked: Tensor, in_features: int) -> Tensor:
    codes, scale, zero_point = kernels.unprepack(prepacked)
    weight: Tensor = kernels.dequantize(codes, scale, zero_point, "float32")
    return (grad.float() @ weight).to(grad.dtype)


@_fake("qmatmul_input_grad")
def _qmatmul_input_grad_fake(grad: Tensor, prepacked: Tensor, in_features: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _qmatmul_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, prepacked, _, bias, _ = inputs
    ctx.save_for_backward(prepacked)
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _qmatmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (prepacked,) = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qtale.qmatmul_input_grad(grad, prepacked, ctx.in_features)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None


def _input_grad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, prepacked, _ = inputs
    ctx.save_for_backward(prepacked)
    ctx.out_features = grad.shape[-1]


def _input_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (prepacked,) = ctx.saved_tensors
    return torch.ops.qtale.qmatmul(grad, prepacked, ctx.out_features, None, "float"), None, None


# fake_quantize


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, *, num_bits: int) -> Any:
    """:func:`qtale.ops.fake_quantize`."""
    return torch.ops.qtale.fake_quantize.default(x, scale, zero_point, num_bits)


@_impl("fake_quantize")
def _fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> Any:
    return kernels.fake_quantize(x, scale, zero_point, num_bits=num_bits)


@_fake("fake_quantize")
def _fake_quantize_fake(x: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_quantize_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.num_bits = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _fake_quantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return None, None, None, None
    half = 2 ** (ctx.num_bits - 1)
    grouped = x.float().reshape(*scale.shape, -1)
    code = torch.round(grouped / scale.float().unsqueeze(-1))
    if zero_point is not None:
        code = code + zero_point.unsqueeze(-1)
    inside = ((code >= -half) & (code <= half - 1)).reshape(x.shape)
    return grad * inside, None, None, None


def project_topk(x: Tensor, matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`qtale.ops.project_topk`."""
    return torch.ops.qtale.project_topk.default(x, matrix, k)  # type: ignore[no-any-return]


def jaccard(a: Tensor, b: Tensor) -> Any:
    """:func:`qtale.ops.jaccard`."""
    return torch.ops.qtale.jaccard.default(a, b)


_impl("project_topk")(kernels.project_topk)


@_fake("project_topk")
def _project_topk_fake(x: Tensor, matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], k)), x.new_empty((x.shape[0], k), dtype=torch.int32)


_impl("jaccard")(kernels.jaccard)


@_fake("jaccard")
def _jaccard_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0],), dtype=torch.float64)


torch.library.register_autograd("qtale::qmatmul", _qmatmul_backward, setup_context=_qmatmul_context, lib=_library)
torch.library.register_autograd(
    "qtale::qmatmul_input_grad", _input_grad_backward, setup_context=_input_grad_context, lib=_library
)
torch.library.register_autograd(
    "qtale::fake_quantize", _fake_quantize_backward, setup_context=_fake_quantize_context, lib=_library
)

# Codes and token sets have no gradient: their results never require one, whatever the inputs do.
for _operator in ("quantize", "dequantize", "pack", "unpack", "prepack", "project_topk", "jaccard"):
    _library.impl(_operator, torch.library.fallthrough_kernel, "Autograd")
