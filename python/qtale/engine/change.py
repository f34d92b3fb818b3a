"""Weights of a running engine that get other bits: region by region, read anew from disk into new memory."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple

from qtale.checkpoint.folder import ModelFolder
from qtale.engine.arena import Arena
from qtale.engine.layout import WeightOptions, plan_layout
from qtale.engine.model import LoadedModel
from qtale.engine.passes import Passes
from qtale.engine.regions import Layout
from qtale.engine.weights import fill_block
from qtale.spec import ResolvedSpec


class Move(NamedTuple):
    """A region that becomes what it is in ``layout``, at ``offset`` of new memory.

    ``modules`` are its Linears, ``growth`` is the bytes that it takes more than before.
    """

    region: str
    modules: tuple[str, ...]
    growth: int
    layout: Layout
    arena: Arena
    offset: int


class WeightChange:
    """In its ``with`` block calls of the engine wait; at the end a decoder over what was moved takes their place.

    Sequences that were open when something moved end with InputError. Entering raises InputError on a closed engine.
    """

    def __init__(self, model: LoadedModel, passes: Passes) -> None:
        self._model, self._passes = model, passes
        self._moved = False

    def moves(self, folder: ModelFolder, specs: Mapping[str, ResolvedSpec | None]) -> list[Move]:
        """What has to move for weights that are rounded as ``specs`` say, what shrinks most first.

        Raises as :func:`plan_layout` does, and Error where the system has no memory for all of it.
        """
        old, compute = self._model.layout, self._model.options.compute
        layout = plan_layout(folder, self._model.spec, WeightOptions(specs=specs), compute)
        growth = {
            name: region.nbytes - old.regions[name].nbytes
            for name, region in layout.regions.items()
            if _kinds(layout, name) != _kinds(old, name)
        }
        arena, offset, moves = Arena(sum(layout.regions[name].nbytes for name in growth)), 0, []
        # In the order in which they are filled, because a huge page is taken whole with its first byte.
        for name in sorted(growth, key=lambda name: growth[name]):
            modules = tuple(source.module for source in layout.sources(name))
            moves.append(Move(name, modules, growth[name], layout, arena, offset))
            offset += layout.regions[name].nbytes
        return moves

    def run(self, folder: ModelFolder, move: Move) -> None:
        """Read a region and give its old memory back; on an error it is as it was."""
        region = move.layout.regions[move.region]
        try:
            for name in region.blocks:
                block = move.layout.blocks[name]
                at = move.offset + block.offset - region.offset
                fill_block(folder, block, move.arena.view(at, block.nbytes))
        except BaseException:
            move.arena.release(move.offset, region.nbytes)
            raise
        # The decoder reads the old memory.
        self._moved = True
        self._passes.close()
        self._model.move(move.region, move.layout, move.arena, move.offset)

    def __enter__(self) -> WeightChange:
        self._passes.lock.acquire()
        try:
            _ = self._passes.decoder
        except BaseException:
            self._passes.lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if self._moved:
                self._passes.replace(self._model.make_decoder())
        finally:
            self._passes.lock.release()


def _kinds(layout: Layout, region: str) -> list[tuple[object, ...]]:
    return [source.kind for source in layout.sources(region)]
