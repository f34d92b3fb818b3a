"""A deployment that the engine runs: weights that move region by region while calls wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from qtale.checkpoint.folder import ModelFolder
from qtale.deployment.running import Specs, Step, StepsTo
from qtale.engine.change import Move, WeightChange
from qtale.engine.engine import load_folder
from qtale.engine.layout import WeightOptions, plan_layout
from qtale.engine.model import LoadOptions
from qtale.engine.spec import read_spec
from qtale.errors import UnsupportedError
from qtale.memory.runtime import ENGINE
from qtale.memory.shape import LinearShape


def unsupported(folder: ModelFolder) -> str | None:
    """Why the engine does not run a folder, or None where it does; raises CheckpointError for broken folders."""
    try:
        plan_layout(folder, read_spec(folder.config, str(folder.path)), WeightOptions())
    except UnsupportedError as error:
        return str(error)
    return None


class EngineModel:
    """The ``engine`` over a folder, its Linears as ``specs`` say; ``shapes`` has all of them by name.

    Raises as :func:`qtale.load` does.
    """

    backend = ENGINE

    def __init__(
        self, folder: ModelFolder, specs: Specs, shapes: dict[str, LinearShape], load: LoadOptions, progress: bool
    ) -> None:
        self._shapes = shapes
        self.specs = dict(specs)
        self.engine = load_folder(folder, WeightOptions(specs=self.specs), load, progress=progress)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """:meth:`qtale.Engine.generate`."""
        return self.engine.generate(*args, **kwargs)

    @contextmanager
    def changing(self, folder: ModelFolder) -> Iterator[StepsTo]:
        """Steps of one projection each (q, k and v being one, gate and up another); calls of the engine wait."""
        with self.engine.change() as change:
            yield partial(self._steps, change, folder)

    def _steps(self, change: WeightChange, folder: ModelFolder, specs: Specs) -> list[Step]:
        return [self._step(change, folder, move, specs) for move in change.moves(folder, specs)]

    def _step(self, change: WeightChange, folder: ModelFolder, move: Move, specs: Specs) -> Step:
        stored = sum(self._shapes[name].stored_bytes for name in move.modules)
        return Step(move.modules, move.growth, stored, partial(self._put, change, folder, move, specs))

    def _put(self, change: WeightChange, folder: ModelFolder, move: Move, specs: Specs) -> None:
        change.run(folder, move)
        self.specs.update((name, specs[name]) for name in move.modules)
