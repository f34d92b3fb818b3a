"""A deployment that PyTorch runs: a transformers model whose Linears are replaced one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from qtale.checkpoint.folder import ModelFolder
from qtale.deployment.layers import build_model, make_layer, mark_config
from qtale.deployment.running import Specs, Step, StepsTo
from qtale.memory.needed import linear_bytes
from qtale.memory.runtime import TORCH
from qtale.memory.shape import LinearShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TorchModel:
    """The running ``model`` of a folder, its Linears as ``specs`` say; ``shapes`` has all of them by name.

    Raises as :func:`qtale.deployment.layers.build_model` does.
    """

    backend = TORCH

    def __init__(
        self, folder: ModelFolder, specs: Specs, shapes: dict[str, LinearShape], compute: str, progress: bool
    ) -> None:
        self._shapes, self._compute = shapes, compute
        self.specs = dict(specs)
        self.model: PreTrainedModel = build_model(folder, specs, compute, progress)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate``."""
        return self.model.generate(*args, **kwargs)

    @contextmanager
    def changing(self, folder: ModelFolder) -> Iterator[StepsTo]:
        """Steps of one Linear each; at the end the model's config says how it is quantized."""
        try:
            yield partial(self._steps, folder)
        finally:
            mark_config(self.model, self.specs)

    def _steps(self, folder: ModelFolder, specs: Specs) -> list[Step]:
        return [self._step(folder, name, specs) for name, spec in specs.items() if spec != self.specs[name]]

    def _step(self, folder: ModelFolder, name: str, specs: Specs) -> Step:
        shape = self._shapes[name]
        growth = linear_bytes(shape, specs[name]) - linear_bytes(shape, self.specs[name])
        return Step((name,), growth, shape.stored_bytes, partial(self._put, folder, name, specs))

    def _put(self, folder: ModelFolder, name: str, specs: Specs) -> None:
        from qtale.nn import set_module

        old: Any = self.model.get_submodule(name)
        layer = make_layer(folder, name, specs[name], old, old.bias, self.model.dtype, self._compute)
        set_module(self.model, name, layer)
        self.specs[name] = specs[name]
