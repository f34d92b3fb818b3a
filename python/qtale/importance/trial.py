"""Several ways of rounding a model, run side by side: how far each moves the predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtale.checkpoint import ModelFolder
from qtale.importance.forward import Tokens, batches
from qtale.importance.metrics import rounding
from qtale.importance.predictions import divergence, predictions
from qtale.layerwise.model import Layer, LayeredModel
from qtale.layerwise.states import MAX_MEMORY, States, open_states
from qtale.spec import QuantSpec

if TYPE_CHECKING:
    import torch

# The spec of a Linear by its full name, None where it stays as stored.
Specs = Callable[[str], QuantSpec | None]


def divergences(folder: ModelFolder, tokens: Tokens, ways: Sequence[Specs], *, progress: bool = True) -> list[float]:
    """KL(p || p') in nats per token of every way of rounding, on token numbers [sequences, length].

    Runs layer by layer: in memory are a layer in float32 twice, the head in float32, and the
    hidden states of every way up to ``MAX_MEMORY``, more of them lie in temporary files. Positions are those at which
    the metric ``kl`` compares. Raises CheckpointError and UnsupportedError as ``measure_tokens`` does.
    """
    from tqdm.auto import tqdm

    count, length = tokens.shape
    with closing(LayeredModel(folder)) as model:
        nbytes = (len(ways) + 2) * count * length * model.hidden_size * 4
        with open_states(None, (length, model.hidden_size), nbytes, MAX_MEMORY) as states:
            walk = _Walk(model, states, tokens, (lambda _: None, *ways))
            with tqdm(total=model.num_layers * len(walk.ways), desc="trial", unit="layer", disable=not progress) as bar:
                return walk.run(bar)


@dataclass(frozen=True)
class _Walk:
    """The first of the ways leaves all as stored."""

    model: LayeredModel
    states: States
    tokens: Tokens
    ways: tuple[Specs, ...]

    def run(self, bar: Any) -> list[float]:
        for place in range(len(self.ways)):
            with self.states.writing(f"way-{place}") as write:
                for start, stop in batches(*self.tokens.shape):
                    write(self.model.embed(self.tokens[start:stop]))
        for index in range(self.model.num_layers):
            with self.model.layer(index) as layer:
                self._layer(index, layer, bar)
        expected = self._predictions(0)
        return [max(0.0, divergence(expected, self._predictions(place))) for place in range(1, len(self.ways))]

    def _layer(self, index: int, layer: Layer, bar: Any) -> None:
        import torch

        weights = self.model.linears(index)
        stored = {name: weight.clone() for name, weight in weights.items()}
        for place, specs in enumerate(self.ways):
            with torch.no_grad():
                for name, weight in weights.items():
                    spec = specs(name)
                    weight.copy_(stored[name])
                    if spec is not None:
                        weight.add_(rounding(name, stored[name], spec, self.model.scale_dtype))
                with self.states.writing(f"way-{place}") as write:
                    for span in batches(*self.tokens.shape):
                        write(layer(self.states.read(f"way-{place}", *span)))
            bar.update()

    def _predictions(self, place: int) -> torch.Tensor:
        spans = batches(*self.tokens.shape)
        hidden = (self.states.read(f"way-{place}", *span) for span in spans)
        return predictions(self.model, hidden, self.tokens.shape[1])
