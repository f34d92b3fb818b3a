"""Leaving out what a layer has done already: a part gives zeros, and the layer begins with the stream behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    Layer = Callable[[torch.Tensor], torch.Tensor]

# Largest difference between a layer and its second half alone, of the largest element.
_SAME = 1e-5


def part_around(parts: Mapping[str, nn.Module], module: str) -> str | None:
    """The outermost of ``parts`` that holds ``module``: the attention that an o_proj is in."""
    around = [name for name in parts if module.startswith(f"{name}.")]
    return min(around, key=len) if around else None


@contextmanager
def silenced(part: nn.Module) -> Iterator[None]:
    """Let ``part`` give zeros in the shape of its input, and no weights, as attention in transformers returns them."""

    def zeros(*arguments: Any, **named: Any) -> Any:
        import torch

        given = arguments[0] if arguments else named["hidden_states"]
        return torch.zeros_like(given), None

    kept = part.forward
    part.forward = zeros
    try:
        yield
    finally:
        part.forward = kept


def begins_behind(part: nn.Module, layer: Layer, before: torch.Tensor, behind: torch.Tensor) -> bool:
    """Whether the layer without ``part`` makes of ``behind`` what all of it makes of ``before``, told from numbers."""
    whole = layer(before)
    try:
        with silenced(part):
            half = layer(behind)
    # Parts that give something else than most do fail in their own ways.
    except Exception:
        return False
    return float((half - whole).abs().max()) <= _SAME * float(whole.abs().max())
