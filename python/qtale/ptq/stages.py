"""What enters the Linear layers of a decoder layer: matrices that share an input are one stage, in order of running."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qtale import names

if TYPE_CHECKING:
    import torch
    from torch import nn

    Layer = Callable[[torch.Tensor], torch.Tensor]
    Modules = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Stage:
    """Modules, by full name, that are given one and the same input.

    ``norm`` names the norm whose output that is. Where the modules' output is added to the residual stream,
    ``residual`` names the norm that the stream enters before.
    """

    modules: tuple[str, ...]
    norm: str | None = None
    residual: str | None = None


@dataclass
class _Seen:
    """One module's run: what entered and what left it."""

    name: str
    given: torch.Tensor
    result: torch.Tensor


# Largest difference of equal sums, of their largest element.
_SAME = 1e-5


class _Reached(BaseException):
    """Ends a forward pass as soon as the wanted input is there."""


def find_stages(parts: Modules, linears: Modules, layer: Layer, hidden: torch.Tensor) -> list[Stage]:
    """The stages of a layer whose modules are ``parts``, found by running it once on hidden states [1, length, hidden].

    Whether an output is added to the residual stream is told from the numbers, not from names.
    """
    seen: list[_Seen] = []
    with ExitStack() as stack:
        for name, part in parts.items():
            if name in linears or names.role(f"{name}.weight", ()) == names.NORM:
                stack.callback(part.register_forward_hook(partial(_note, seen, name)).remove)
        output = layer(hidden)
    stages: dict[int, list[str]] = {}
    for run in seen:
        if run.name in linears:
            stages.setdefault(id(run.given), []).append(run.name)
    made = {id(run.result): run.name for run in seen if run.name not in linears}
    return [
        Stage(tuple(found), made.get(given), _residual(seen, linears, found[0], output))
        for given, found in stages.items()
    ]


def _note(
    seen: list[_Seen],
    name: str,
    _: nn.Module,
    arguments: tuple[torch.Tensor, ...],
    result: torch.Tensor,
) -> None:
    seen.append(_Seen(name, arguments[0], result))


def _residual(seen: list[_Seen], linears: Modules, module: str, output: torch.Tensor) -> str | None:
    """The norm before ``module`` whose input plus the module's output is what the next norm gets or the layer gives."""
    at = next(number for number, run in enumerate(seen) if run.name == module)
    result = seen[at].result
    for before in reversed(seen[:at]):
        if before.name in linears or before.given.shape != result.shape:
            continue
        wanted = before.given + result
        after = [run.given for run in seen[at + 1 :] if run.name not in linears and run.given.shape == result.shape]
        difference = (after[0] if after else output) - wanted
        return before.name if float(difference.abs().max()) <= _SAME * float(wanted.abs().max()) else None
    return None


def rows_entering(
    parts: Modules, stage: Stage, layer: Layer, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a stage's modules are given when the layer runs on hidden states [n, length, hidden].

    Returns the input [n * length, in_features] and the residual stream [n * length, hidden], None where the stage is
    not added to it.
    """
    found: list[torch.Tensor] = []
    residual: list[torch.Tensor] = []

    def take(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        found.append(arguments[0])
        raise _Reached

    def note(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        residual.append(arguments[0])

    handles: list[Any] = [parts[stage.modules[0]].register_forward_pre_hook(take)]
    if stage.residual is not None:
        handles.append(parts[stage.residual].register_forward_pre_hook(note))
    try:
        layer(hidden)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    stream = residual[0].reshape(-1, residual[0].shape[-1]) if residual else None
    return found[0].reshape(-1, found[0].shape[-1]), stream
