"""The weights of the layer in work, in two forms that take turns in its modules: dense, and quantized so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qtale.ptq.streams import DENSE, QUANTIZED

if TYPE_CHECKING:
    import torch


class LayerWeights:
    """Weights [out, in] by module name; the modules hold the quantized form outside of :meth:`using`."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._forms = {kind: {name: p.data for name, p in parameters.items()} for kind in (DENSE, QUANTIZED)}

    def dense(self, name: str) -> torch.Tensor:
        """The dense weight of a module."""
        return self._forms[DENSE][name]

    def set_quantized(self, name: str, value: torch.Tensor) -> None:
        """Give a module what it computes with from now on."""
        self._forms[QUANTIZED][name] = value
        self._parameters[name].data = value

    @contextmanager
    def using(self, kind: str) -> Iterator[None]:
        """Let the modules compute with one form."""
        self._put(kind)
        try:
            yield
        finally:
            self._put(QUANTIZED)

    def _put(self, kind: str) -> None:
        for name, parameter in self._parameters.items():
            parameter.data = self._forms[kind][name]
