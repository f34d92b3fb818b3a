"""``QLinear``: a Linear whose weight stays quantized, in the layout that the kernels of this CPU read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from qtale import _core, ops
from qtale.errors import InputError, UnsupportedError
from qtale.nn.packed import pack_weight, packed_shapes, unpack_weight
from qtale.spec import QuantSpec, ResolvedSpec, check_compute
from qtale.torch_ops import qmatmul


class QLinear(nn.Module):
    """``x @ weight.T + bias`` with a quantized weight; x [..., in_features] in float32, float16 or bfloat16.

    ``compute="int8"`` rounds activations to 8 bits on the way in (fast), ``"int16"`` to 16, ``"float"`` takes them as
    they are; error bounds stand at :func:`qtale.ops.qmatmul`. The mode may be changed at any time. Gradients reach x
    and bias.

    The state dict holds compressed-tensors' names (``weight_packed``, ``weight_scale``, ``weight_shape``, and
    ``weight_zero_point`` where asymmetric), so it loads on every CPU. In memory the weight exists once, prepacked.
    Moves to another dtype change the bias only: scales keep the dtype they were made with.
    Made by :meth:`from_linear` and :meth:`from_tensors`; the constructor gives a weight of zeros to load a state into.
    """

    prepacked: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec | ResolvedSpec | None = None,
        bias: bool = True,
        *,
        compute: str = "int8",
        scale_dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        check_compute("QLinear", compute)
        self.in_features = in_features
        self.out_features = out_features
        self.spec = _resolve(spec, in_features)
        self.compute = compute
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        params = (out_features, self.spec.groups(in_features))
        codes = torch.zeros((out_features, in_features), dtype=torch.int8, device=device)
        scale = torch.ones(params, dtype=scale_dtype, device=device)
        self._set_weight(codes, scale, None if self.spec.symmetric else torch.zeros_like(scale, dtype=torch.int8))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        spec: QuantSpec | ResolvedSpec | None = None,
        *,
        name: str = "QLinear.from_linear",
        compute: str = "int8",
    ) -> QLinear:
        """Quantize a Linear by rounding to nearest; the default spec is 4 bits, symmetric, automatic groups.

        ``name`` is what errors call the module. Scales have the weight's dtype; the bias is copied.
        Raises InputError for NaN or infinite weights and groups that do not divide in_features.
        """
        weight = linear.weight.detach()
        resolved = _resolve(spec, weight.shape[1], name)
        try:
            codes, scale, zero_point = ops.quantize(weight, resolved.num_bits, resolved.group_size, resolved.symmetric)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        bias = linear.bias
        return cls.from_tensors(codes, scale, zero_point, num_bits=resolved.num_bits, bias=bias, compute=compute)

    @classmethod
    def from_tensors(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None = None,
        *,
        num_bits: int,
        bias: Tensor | None = None,
        compute: str = "int8",
    ) -> QLinear:
        """From int8 codes [out, in], scale [out, groups] and zero_point int8 [out, groups] (None: symmetric).

        Raises InputError for shapes or dtypes that do not fit together.
        """
        if codes.ndim != 2 or scale.ndim != 2 or not scale.shape[1] or codes.shape[1] % scale.shape[1]:
            raise InputError(
                f"QLinear.from_tensors: codes {list(codes.shape)} and scale {list(scale.shape)} do not fit; "
                "expected [out, in] and [out, groups] with groups dividing in."
            )
        out_features, in_features = codes.shape
        group_size = in_features // scale.shape[1] if scale.shape[1] > 1 else 0
        spec = ResolvedSpec(num_bits, group_size, zero_point is None)
        layer = cls(in_features, out_features, spec, bias is not None, compute=compute, device="meta")
        layer._set_weight(codes, scale, zero_point)
        if bias is not None:
            if bias.shape != (out_features,):
                raise InputError(f"QLinear: bias has shape {list(bias.shape)}; expected [{out_features}].")
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] in the dtype of x."""
        if not torch.compiler.is_compiling() and self._isa != _core.cpu_isa():
            self._set_weight(*ops.unprepack(self.prepacked))
        return cast(Tensor, qmatmul(x, self.prepacked, self.out_features, self.bias, self.compute))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight [out, in] that this layer stands for, by default in the dtype of its scales."""
        codes, scale, zero_point = self._unprepacked()
        name = str(dtype or scale.dtype).removeprefix("torch.")
        return cast(Tensor, ops.dequantize(codes, scale, zero_point, name))

    def packed_state(self) -> dict[str, Tensor]:
        """The weight as compressed-tensors stores it: suffix (``weight_packed`` …) → tensor."""
        if self.prepacked.is_meta:
            return packed_shapes((self.out_features, self.in_features), self.spec, self.scale_dtype)
        return pack_weight(*self._unprepacked(), self.spec.num_bits)

    def extra_repr(self) -> str:
        """in_features=576, out_features=1536, bias=False, bits=4, group_size=64, symmetric, compute=int8"""
        spec = self.spec
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={spec.num_bits}, group_size={spec.group_size or 'channel'}, "
            f"{'symmetric' if spec.symmetric else 'asymmetric'}, compute={self.compute}"
        )

    def _set_weight(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        prepacked = ops.prepack(codes, scale, zero_point, num_bits=self.spec.num_bits)
        self.register_buffer("prepacked", prepacked, persistent=False)
        self.scale_dtype = scale.dtype
        # Kernel layouts differ between instruction sets; forward prepacks again where another one is in use by then.
        self._isa = _core.cpu_isa()

    def _unprepacked(self) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.prepacked.is_meta:
            raise InputError("QLinear: the weight is on the meta device, without data; load a state dict first.")
        return cast("tuple[Tensor, Tensor, Tensor | None]", ops.unprepack(self.prepacked))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QLinear:
        try:
            device = fn(torch.empty(0, dtype=torch.uint8, device=self.prepacked.device)).device
        except NotImplementedError:
            raise
        except (AssertionError, RuntimeError) as error:
            raise UnsupportedError(f"QLinear: cannot be moved there: {str(error).splitlines()[0]}") from error
        if device.type not in ("cpu", "meta"):
            raise UnsupportedError(
                f"QLinear: cannot be moved to {device}, because {_core.build_info()['cuda_reason']}; keep it on the "
                "CPU, or make a Linear of its dequantize() to run elsewhere."
            )
        return cast(QLinear, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + suffix: tensor for suffix, tensor in self.packed_state().items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        suffixes = packed_shapes((self.out_features, self.in_features), self.spec, self.scale_dtype)
        own = {suffix: state_dict[prefix + suffix] for suffix in suffixes if prefix + suffix in state_dict}
        missing_keys.extend(prefix + suffix for suffix in suffixes if suffix not in own)
        if len(own) == len(suffixes):
            try:
                self._set_weight(*unpack_weight(own, (self.out_features, self.in_features), self.spec))
            except InputError as error:
                error_msgs.append(f"{prefix.removesuffix('.') or 'QLinear'}: {error}")
        rest = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in own}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    # Pickles and copies hold the portable form as well.
    def __getstate__(self) -> dict[str, Any]:
        if self.prepacked.is_meta:
            return self.__dict__
        state = {**self.__dict__, "_buffers": {**self._buffers, "prepacked": None}}
        return {**state, "_packed": self.packed_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed = state.pop("_packed", None)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if packed is not None:
            self._set_weight(*unpack_weight(packed, (self.out_features, self.in_features), self.spec))


def _resolve(spec: QuantSpec | ResolvedSpec | None, in_features: int, name: str = "QLinear") -> ResolvedSpec:
    if isinstance(spec, ResolvedSpec):
        return spec
    return (spec or QuantSpec()).resolve(name, in_features)
