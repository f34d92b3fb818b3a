"""The forward pass over all sequences, layer by layer, with the scores of every layer on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qtale.errors import CheckpointError, InputError
from qtale.importance.metrics import Metric, Sets
from qtale.importance.options import LOSS_METRICS, MeasureOptions
from qtale.importance.topk import token_sets
from qtale.layerwise.journal import Journal
from qtale.layerwise.model import LayeredModel
from qtale.layerwise.states import States

if TYPE_CHECKING:
    import torch

Tokens = npt.NDArray[np.int64]
# Tokens that go through a layer together: enough for fast products, little enough to stay in the caches.
BATCH_TOKENS = 512


def boundary(index: int) -> str:
    """The name of the hidden states before layer ``index``."""
    return f"boundary-{index}"


def kept(index: int) -> str:
    """The name of the part of them that metrics of the loss come back to."""
    return f"kept-{index}"


def batches(count: int, length: int) -> Iterator[tuple[int, int]]:
    """Ranges of sequences that are computed together."""
    size = max(1, BATCH_TOKENS // length)
    for start in range(0, count, size):
        yield start, min(start + size, count)


@dataclass
class Forward:
    """A forward pass over ``tokens`` [sequences, length]; as a :class:`LayerView` it shows the layer run last."""

    model: LayeredModel
    states: States
    tokens: Tokens
    options: MeasureOptions
    journal: Journal
    metrics: Mapping[str, Metric]
    index: int = 0

    def __post_init__(self) -> None:
        self.num_layers = self.model.num_layers
        self._sets: tuple[Sets, Sets] | None = None
        self._matrix: torch.Tensor | None = None

    def run(self, bar: Any) -> None:
        """Run the layers that the journal lacks; afterwards it holds the entries ``first_sets`` and ``layers``.

        ``bar`` counts sequences times layers. Raises CheckpointError where a layer gives NaN or infinite states.
        """
        entries = self.journal.entries
        if "first_sets" not in entries:
            self._embed()
            self.journal.save("first_sets", self._last(self._read_sets(0)))
        done = len(entries.get("layers", []))
        bar.update(done * len(self.tokens))
        for index in range(done):  # left by a run that was killed just before it removed them
            self.states.drop(boundary(index))
        if done == self.num_layers:
            self.states.drop(boundary(done))
            return
        before = self._read_sets(done)
        for index in range(done, self.num_layers):
            before = self._run_layer(index, before, bar)
        self.states.drop(boundary(self.num_layers))

    def _embed(self) -> None:
        with self.states.writing(boundary(0)) as write:
            for start, stop in batches(*self.tokens.shape):
                write(self._checked(self.model.embed(self.tokens[start:stop]), start, "the embedding"))
        self._keep(0)

    def _run_layer(self, index: int, before: Sets | None, bar: Any) -> Sets | None:
        self.index = index
        with self.model.layer(index) as layer:
            with self.states.writing(boundary(index + 1)) as write:
                for start, stop in batches(*self.tokens.shape):
                    after = layer(self.states.read(boundary(index), start, stop))
                    write(self._checked(after, start, f"layer {index}"))
                    bar.update(stop - start)
            self._keep(index + 1)
            sets = self._read_sets(index + 1)
            self._sets = None if before is None or sets is None else (before, sets)
            scores = {name: metric.score(self) for name, metric in self.metrics.items()}
        found = {
            "scores": {name: [score.score, list(score.per_sequence)] for name, score in scores.items()},
            "errors": scores["error"].errors if "error" in scores else {},
            "sets": self._last(sets),
        }
        # What went into the layer is needed to repeat it, so it goes only when the result is on the disk.
        self.journal.save("layers", [*self.journal.entries.get("layers", []), found])
        self.states.drop(boundary(index))
        return sets

    def _checked(self, hidden: torch.Tensor, start: int, where: str) -> torch.Tensor:
        if bool(hidden.sum().isfinite()):
            return hidden
        finite = hidden.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            sequence = start + int((~finite).nonzero()[0])
            raise CheckpointError(
                f"{self.model.folder.path}: {where} gives NaN or infinite hidden states for sequence {sequence}, in "
                "float32; its weights are broken, so download or convert the model again."
            )
        return hidden

    def _keep(self, index: int) -> None:
        if not set(LOSS_METRICS).isdisjoint(self.options.metrics):
            count = min(self.options.loss_sequences, len(self.tokens))
            with self.states.writing(kept(index)) as write:
                for start, stop in batches(count, self.tokens.shape[1]):
                    write(self.states.read(boundary(index), start, stop).clone())

    def _read_sets(self, index: int) -> Sets | None:
        """Token sets [sequences, positions, k] of the hidden states before layer ``index``; None if not asked for."""
        if "jaccard" not in self.metrics:
            return None
        if self._matrix is None:
            self._matrix = self.model.matrix(self.options.matrix)
        found = []
        for start, stop in batches(*self.tokens.shape):
            hidden = self.states.read(boundary(index), start, stop)
            if self.options.positions == "last":
                hidden = hidden[:, -1:]
            rows = hidden.reshape(-1, hidden.shape[-1])
            rows = self.model.normed(rows) if self.options.norm == "final" else rows
            found.append(token_sets(rows, self._matrix, self.options.top_k).reshape(*hidden.shape[:2], -1))
        return np.concatenate(found)

    @staticmethod
    def _last(sets: Sets | None) -> list[list[int]] | None:
        return None if sets is None else sets[:, -1].tolist()

    def states_of_layer(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See :class:`LayerView`."""
        for start, stop in batches(*self.tokens.shape):
            before, after = (self.states.read(boundary(self.index + step), start, stop) for step in (0, 1))
            yield before, after

    def weights(self) -> Mapping[str, torch.Tensor]:
        """See :class:`LayerView`."""
        return self.model.linears(self.index)

    def sets(self) -> tuple[Sets, Sets]:
        """See :class:`LayerView`."""
        if self._sets is None:
            raise InputError("measure: token sets are there only where jaccard is among the metrics; add it.")
        return self._sets
