"""Modules whose codes are fixed and whose scales can be tuned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from qtale import ops
from qtale.ptq.worklist import LayerRow

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class TunableLinear(nn.Module):
    """A Linear of fixed codes: weight = code * scale * (1 + change), ``change`` [out, groups] being its parameter."""

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.change = nn.Parameter(torch.zeros(scale.shape))
        self.bias = bias

    @classmethod
    def from_packed(cls, row: LayerRow, packed: Packed, bias: torch.Tensor | None) -> TunableLinear:
        """From the stored tensors weight_packed, weight_scale and weight_zero_point (None when symmetric)."""
        codes = ops.unpack(packed[0], row.num_bits, row.shape[1]).to(torch.int16)
        if packed[2] is not None:
            zero_point = ops.unpack(packed[2].T.contiguous(), row.num_bits, row.shape[0]).T
            codes = (codes.reshape(row.shape[0], zero_point.shape[1], -1) - zero_point[..., None]).reshape(row.shape)
        return cls(codes, packed[1], bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] → [..., out]."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        scale = self.scale.float() * (1 + self.change)
        weight = _Restore.apply(scale, self.codes, dtype)  # type: ignore[no-untyped-call]
        return nn.functional.linear(x, weight, self.bias)

    def tuned_scale(self) -> torch.Tensor:
        """The scale [out, groups] in its stored dtype."""
        return (self.scale.float() * (1 + self.change.detach())).to(self.scale.dtype)


class _Restore(torch.autograd.Function):
    """codes * scale; only the scale gets a gradient, and only codes are kept for it."""

    @staticmethod
    def forward(ctx: Any, scale: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(codes)
        ctx.groups = scale.shape[1]
        grouped = codes.to(dtype).reshape(len(codes), ctx.groups, -1)
        return (grouped * scale.to(dtype)[..., None]).reshape(codes.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (codes,) = ctx.saved_tensors
        product = gradients[0] * codes
        return product.reshape(len(codes), ctx.groups, -1).sum(-1, dtype=torch.float32), None, None


class RelativeChange(nn.Module):
    """A parametrization: the value is ``base`` * (1 + parameter)."""

    base: torch.Tensor

    def __init__(self, base: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("base", base)

    def forward(self, change: torch.Tensor) -> torch.Tensor:
        """The value of a change."""
        return self.base * (1 + change)

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        """No change, whatever the value: it is the base."""
        return torch.zeros_like(value)

    @classmethod
    def on_weight_of(cls, module: nn.Module) -> nn.Parameter:
        """Make a module's weight its value now times 1 + a parameter, and return that."""
        weight: Any = module.weight
        weight.requires_grad_(True)
        parametrize.register_parametrization(module, "weight", cls(weight.detach().clone()))
        parametrized: Any = module.parametrizations
        return parametrized.weight.original  # type: ignore[no-any-return]
