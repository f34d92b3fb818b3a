"""Scores from the model's loss: how much worse it gets when one layer's weights change.

All walk over the layers with the hidden states that the forward pass kept, so one layer at a time is in memory; with
``fisher`` its gradient and their squares are too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtale.importance.forward import Tokens, batches, kept
from qtale.importance.metrics import pieces, rounding
from qtale.importance.options import ERROR_BITS, MeasureOptions
from qtale.importance.predictions import divergence, predictions
from qtale.layerwise.journal import Journal
from qtale.layerwise.model import LayeredModel
from qtale.layerwise.states import States

if TYPE_CHECKING:
    import torch


def _gradient(index: int) -> str:
    return f"gradient-{index}"


@dataclass(frozen=True)
class LossPass:
    """Walks of ``fisher`` and ``noise`` over the kept hidden states of ``tokens`` [sequences, length]."""

    model: LayeredModel
    states: States
    tokens: Tokens
    options: MeasureOptions
    journal: Journal

    def fisher(self, bar: Any) -> None:
        """Predicted loss increase of quantizing each layer, from the empirical Fisher information.

        The journal's entry ``fisher`` maps a layer to bits → module → 1/2 sum_w F_w (ŵ_w - w_w)^2, in nats per token,
        where F_w is the mean over sequences of (d loss / d w)^2 with the loss summed over the sequence, divided by
        its length (LeCun et al., Optimal Brain Damage, 1989, with the Fisher information for the Hessian).
        """
        done = self.journal.entries.get("fisher", {})
        if not done:
            self._head_gradient()
        bar.update(len(done))
        for index in reversed(range(self.model.num_layers - len(done))):
            costs = self._layer_costs(index)
            self.journal.save("fisher", {**self.journal.entries.get("fisher", {}), str(index): costs})
            self.states.drop(_gradient(index + 1))
            bar.update()

    def clear(self) -> None:
        """Drop all states that the walks used."""
        for index in range(self.model.num_layers + 1):
            self.states.drop(kept(index))
            self.states.drop(_gradient(index))

    def _head_gradient(self) -> None:
        import torch

        last = self.model.num_layers
        with self.model.head() as head, self.states.writing(_gradient(last)) as write:
            for sequence, ids in enumerate(self.tokens):
                hidden = self.states.read(kept(last), sequence, sequence + 1).clone().requires_grad_()
                logits = head(hidden)[0, :-1]
                torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="sum").backward()  # type: ignore[no-untyped-call]
                write(_present(hidden.grad))

    def _layer_costs(self, index: int) -> dict[str, dict[str, float]]:
        import torch

        with self.model.layer(index) as layer, self.states.writing(_gradient(index)) as write:
            weights = self.model.linears(index)
            squares = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
            for weight in weights.values():
                weight.requires_grad_()
            for sequence in range(len(self.tokens)):
                hidden = self.states.read(kept(index), sequence, sequence + 1).clone().requires_grad_()
                layer(hidden).backward(self.states.read(_gradient(index + 1), sequence, sequence + 1))  # type: ignore[no-untyped-call]
                write(_present(hidden.grad))
                for name, weight in weights.items():
                    gradient = _present(weight.grad)
                    squares[name].addcmul_(gradient, gradient)
                    weight.grad = None
            return self._costs({name: weight.detach() for name, weight in weights.items()}, squares)

    def _costs(self, weights: dict[str, torch.Tensor], squares: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
        scale = 0.5 / (len(self.tokens) * (self.tokens.shape[1] - 1))
        found = {}
        for bits in sorted({*ERROR_BITS, self.options.error_bits}, reverse=True):
            spec = self.options.spec(bits)
            found[str(bits)] = {
                name: scale * _dot(squares[name], rounding(name, weight, spec, self.model.scale_dtype).square_())
                for name, weight in weights.items()
            }
        return found

    def noise(self, bar: Any) -> None:
        """How the predictions change when noise is added to the weights of one layer, as HIGGS measures it.

        The journal's entry ``noise`` lists KL(p || p') / t^2 in nats per token for each layer, p' being the model with
        Gaussian noise of relative Frobenius size t in every Linear of that layer (Malinovskii et al.,
        arXiv 2411.17525). The divergence stands for the increase of the loss: its part that is linear in the noise,
        which is chance, is zero.
        """
        found = list(self.journal.entries.get("noise", []))
        bar.update(len(found))
        if len(found) == self.model.num_layers:
            return
        expected = self._expected()
        for index in range(len(found), self.model.num_layers):
            predicted = self._predictions(self._disturbed(index, self._add_noise))
            found.append(divergence(expected, predicted) / self.options.noise**2)
            self.journal.save("noise", found)
            bar.update()

    def kl(self, bar: Any) -> None:
        """How the predictions change when one layer is rounded, at every width of ``ERROR_BITS``.

        The journal's entry ``kl`` maps a layer to bits → KL(p || p') in nats per token. Unlike ``fisher`` and
        ``noise`` it holds where rounding is so coarse that the loss is no longer quadratic in it.
        """
        found = dict(self.journal.entries.get("kl", {}))
        bar.update(len(found))
        if len(found) == self.model.num_layers:
            return
        expected = self._expected()
        for index in range(len(found), self.model.num_layers):
            costs = {}
            for bits in sorted({*ERROR_BITS, self.options.error_bits}, reverse=True):
                predicted = self._predictions(self._disturbed(index, lambda layer, bits=bits: self._round(layer, bits)))  # type: ignore[misc]
                costs[str(bits)] = max(0.0, divergence(expected, predicted))
            found[str(index)] = costs
            self.journal.save("kl", found)
            bar.update()

    def _expected(self) -> torch.Tensor:
        last = kept(self.model.num_layers)
        return self._predictions([self.states.read(last, *span) for span in self._spans()])

    def _round(self, index: int, bits: int) -> None:
        for name, weight in self.model.linears(index).items():
            weight.add_(rounding(name, weight, self.options.spec(bits), self.model.scale_dtype))

    def _spans(self) -> Iterator[tuple[int, int]]:
        return batches(*self.tokens.shape)

    def _disturbed(self, index: int, change: Callable[[int], None]) -> list[torch.Tensor]:
        """The last hidden states of every batch when layer ``index`` is changed and those after it are not."""
        import torch

        hidden = [self.states.read(kept(index), *span) for span in self._spans()]
        for later in range(index, self.model.num_layers):
            with self.model.layer(later) as layer, torch.no_grad():
                if later == index:
                    change(index)
                hidden = [layer(batch) for batch in hidden]
        return hidden

    def _add_noise(self, index: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(self.options.seed * 100_003 + index)
        for weight in self.model.linears(index).values():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise, alpha=self.options.noise * float(weight.norm()) / math.sqrt(weight.numel()))

    def _predictions(self, hidden: list[torch.Tensor]) -> torch.Tensor:
        return predictions(self.model, hidden, self.tokens.shape[1])


def _present(gradient: torch.Tensor | None) -> torch.Tensor:
    if gradient is None:
        raise RuntimeError("measure: the backward pass gave no gradient")
    return gradient


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.fsum(float(x.dot(y)) for x, y in zip(pieces([a]), pieces([b]), strict=True))
