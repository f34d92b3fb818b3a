"""``torch.ops.qtale``, continued: products with dense weights, and the rows that routed execution moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qtale import kernels
from qtale.torch_library import define, fake, impl, register_backward

define(
    'matmul(Tensor x, Tensor weight, Tensor? bias, str compute="float") -> Tensor',
    "compact_rows(Tensor x, Tensor indices) -> Tensor",
    "scatter_add_rows(Tensor x, Tensor delta, Tensor indices, Tensor? gates) -> Tensor",
)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, compute: str) -> Any:
    """:func:`qtale.ops.matmul`."""
    return torch.ops.qtale.matmul.default(x, weight, bias, compute)


def compact_rows(x: Tensor, indices: Tensor) -> Any:
    """:func:`qtale.ops.compact_rows`."""
    return torch.ops.qtale.compact_rows.default(x, indices)


def scatter_add_rows(x: Tensor, delta: Tensor, indices: Tensor, gates: Tensor | None) -> Any:
    """:func:`qtale.ops.scatter_add_rows`."""
    return torch.ops.qtale.scatter_add_rows.default(x, delta, indices, gates)


impl("matmul")(kernels.matmul)
impl("compact_rows")(kernels.compact_rows)
impl("scatter_add_rows")(kernels.scatter_add_rows)


@fake("matmul")
def _matmul_fake(x: Tensor, weight: Tensor, bias: Tensor | None, compute: str = "float") -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@fake("compact_rows")
def _compact_rows_fake(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty((indices.shape[0], x.shape[1]), dtype=torch.float32)


@fake("scatter_add_rows")
def _scatter_add_rows_fake(x: Tensor, delta: Tensor, indices: Tensor, gates: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _matmul_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    rows = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        grad_x = grad @ weight.float()
    if ctx.needs_input_grad[1]:
        grad_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0).to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, None


def _compact_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices = inputs
    ctx.save_for_backward(indices)
    ctx.shape, ctx.dtype = x.shape, x.dtype


def _compact_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return grad.new_zeros(ctx.shape).index_add(0, indices, grad).to(ctx.dtype), None


def _scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    delta, indices, gates = ctx.saved_tensors
    grad_delta = grad_gates = None
    rows = grad.index_select(0, indices)
    if ctx.needs_input_grad[1]:
        grad_delta = rows if gates is None else rows * gates.unsqueeze(1)
    if ctx.needs_input_grad[3]:
        grad_gates = (rows * delta).sum(1)
    return grad, grad_delta, None, grad_gates


register_backward("matmul", _matmul_backward, _matmul_context)
register_backward("compact_rows", _compact_backward, _compact_context)
register_backward("scatter_add_rows", _scatter_backward, _scatter_context)
