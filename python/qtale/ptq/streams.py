"""Hidden states of all calibration sequences between layers: of the quantized model, and of the dense one beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qtale.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from qtale.layerwise.model import Layer, LayeredModel
    from qtale.layerwise.states import States

# What the layers quantized so far give, and what the dense model gives.
QUANTIZED, DENSE = "quantized", "dense"
# Inside a layer quantized so far: what enters the last matrix of its attention, and the stream behind the attention.
ENTERING, BEHIND = "entering", "behind"
# Tokens that go through a layer together: enough for fast products, little enough to stay in the caches.
BATCH_TOKENS = 1024


@dataclass
class Streams:
    """``kinds`` of hidden states before each layer, for ``tokens`` [sequences, length]."""

    model: LayeredModel
    states: States
    tokens: npt.NDArray[np.int64]
    kinds: tuple[str, ...]

    def embed(self) -> None:
        """Write the states before the first layer."""
        for kind in self.kinds:
            with self.states.writing(self._name(kind, 0)) as write:
                for start, stop in self.ranges():
                    write(self._checked(self.model.embed(self.tokens[start:stop]), "the embedding"))

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Ranges of sequences that are computed together."""
        count, length = self.tokens.shape
        size = max(1, BATCH_TOKENS // length)
        for start in range(0, count, size):
            yield start, min(start + size, count)

    def read(self, kind: str, index: int, start: int, stop: int) -> torch.Tensor:
        """Sequences ``start`` to ``stop`` before layer ``index``: [stop - start, length, hidden]."""
        return self.states.read(self._name(kind, index), start, stop)

    def advance(self, kind: str, index: int, layer: Layer, done: Callable[[int], object], source: str = "") -> None:
        """Run a layer over a stream; ``done`` is told the sequences. Raises CheckpointError for NaN or infinities.

        What enters it is the stream ``source`` of the same index, ``kind`` by default.
        """
        with self.states.writing(self._name(kind, index + 1)) as write:
            for start, stop in self.ranges():
                write(self._checked(layer(self.read(source or kind, index, start, stop)), f"layer {index}"))
                done(stop - start)

    def fill(self, kind: str, index: int, piece: Callable[[int, int], torch.Tensor]) -> None:
        """Write states inside a layer: ``piece`` gives those of the sequences from start to stop."""
        with self.states.writing(self._name(kind, index)) as write:
            for start, stop in self.ranges():
                write(piece(start, stop))

    def forget(self, kind: str, index: int) -> None:
        """Drop states inside a layer."""
        self.states.drop(self._name(kind, index))

    def seals(self, index: int) -> dict[str, str]:
        """Checksums of the states before a layer."""
        return {kind: self.states.seal(self._name(kind, index)) for kind in self.kinds}

    def check(self, index: int, seals: Mapping[str, str]) -> None:
        """Raise CheckpointError where the states before a layer are not those that were written."""
        if self.seals(index) != seals:
            raise CheckpointError(f"the hidden states before layer {index} are damaged; start again in a new folder.")

    def drop(self, index: int) -> None:
        """Forget the states before a layer."""
        for kind in (*self.kinds, ENTERING, BEHIND):
            self.forget(kind, index)

    @staticmethod
    def _name(kind: str, index: int) -> str:
        return f"{kind}-{index}"

    def _checked(self, hidden: torch.Tensor, where: str) -> torch.Tensor:
        if not bool(hidden.sum().isfinite()) and not bool(hidden.isfinite().all()):
            raise CheckpointError(
                f"{self.model.folder.path}: {where} gives NaN or infinite activations; its weights are broken, so "
                "download or convert the model again."
            )
        return hidden
