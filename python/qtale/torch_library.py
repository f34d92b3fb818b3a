"""What defines an operator of ``torch.ops.qtale``: schema, CPU kernel, tracing and gradient.

Through ``torch.library.Library``, whose calls cost a fraction of ``torch.library.custom_op``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from qtale import _core
from qtale.errors import UnsupportedError

F = TypeVar("F", bound=Callable[..., Any])

_library: Any = torch.library.Library("qtale", "DEF")  # type: ignore[no-untyped-call]


def define(*schemas: str) -> None:
    """Adds operators to ``torch.ops.qtale``."""
    for schema in schemas:
        _library.define(schema)


def impl(name: str) -> Callable[[F], F]:
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


def fake(name: str) -> Callable[[F], F]:
    """Registers what tracing needs to know of an operator."""
    return cast("Callable[[F], F]", torch.library.register_fake(f"qtale::{name}", lib=_library))


def register_backward(name: str, backward: Callable[..., Any], context: Callable[..., None]) -> None:
    """Registers the gradient of an operator."""
    torch.library.register_autograd(f"qtale::{name}", backward, setup_context=context, lib=_library)


def without_gradient(*names: str) -> None:
    """Results of these operators never require a gradient, whatever the inputs do."""
    for name in names:
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
