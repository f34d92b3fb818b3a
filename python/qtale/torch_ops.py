"""``torch.ops.qtale``: the operators for torch tensors, with shapes for tracing and formulas for autograd.

Importing this module registers them; :mod:`qtale.ops` imports it with the first torch tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qtale import _core, kernels
from qtale.errors import InputError
from qtale.tensors import torch_dtype_name
from qtale.torch_library import define, fake, impl, register_backward, without_gradient

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
define(*_SCHEMAS)


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
@impl("quantize")
def _quantize(
    weight: Tensor, num_bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, zero_point = kernels.quantize(weight, num_bits, group_size, symmetric, _name(scale_dtype))
    return codes, scale, codes.new_empty((codes.shape[0], 0)) if zero_point is None else zero_point


@fake("quantize")
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


@impl("dequantize")
def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype | None) -> Any:
    return kernels.dequantize(codes, scale, zero_point, _name(dtype))


@fake("dequantize")
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


impl("pack")(kernels.pack)
impl("unpack")(kernels.unpack)


@impl("prepack")
def _prepack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> Any:
    return kernels.prepack(codes, scale, zero_point, num_bits=num_bits)


@fake("pack")
def _pack_fake(codes: Tensor, num_bits: int) -> Tensor:
    rows, cols = codes.shape
    return codes.new_empty((rows, (cols * num_bits + 31) // 32), dtype=torch.int32)


@fake("unpack")
def _unpack_fake(packed: Tensor, num_bits: int, cols: int) -> Tensor:
    return packed.new_empty((packed.shape[0], cols), dtype=torch.int8)


@fake("prepack")
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


impl("qmatmul")(kernels.qmatmul)


@fake("qmatmul")
def _qmatmul_fake(x: Tensor, prepacked: Tensor, out_features: int, bias: Tensor | None, compute: str) -> Tensor:
    if x.device != prepacked.device:
        raise InputError(f"qmatmul: x is on {x.device}, the weight on {prepacked.device}; move them to one device.")
    return x.new_empty((*x.shape[:-1], out_features))


@impl("qmatmul_input_grad")
def _qmatmul_input_grad(grad: Tensor, prepacked: Tensor, in_features: int) -> Tensor:
    codes, scale, zero_point = kernels.unprepack(prepacked)
    weight: Tensor = kernels.dequantize(codes, scale, zero_point, "float32")
    return (grad.float() @ weight).to(grad.dtype)


@fake("qmatmul_input_grad")
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


@impl("fake_quantize")
def _fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> Any:
    return kernels.fake_quantize(x, scale, zero_point, num_bits=num_bits)


@fake("fake_quantize")
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


impl("project_topk")(kernels.project_topk)


@fake("project_topk")
def _project_topk_fake(x: Tensor, matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], k)), x.new_empty((x.shape[0], k), dtype=torch.int32)


impl("jaccard")(kernels.jaccard)


@fake("jaccard")
def _jaccard_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0],), dtype=torch.float64)


register_backward("qmatmul", _qmatmul_backward, _qmatmul_context)
register_backward("qmatmul_input_grad", _input_grad_backward, _input_grad_context)
register_backward("fake_quantize", _fake_quantize_backward, _fake_quantize_context)

# Codes and token sets have no gradient: their results never require one, whatever the inputs do.
without_gradient("quantize", "dequantize", "pack", "unpack", "prepack", "project_topk", "jaccard")
