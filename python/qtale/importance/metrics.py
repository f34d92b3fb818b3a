"""Scores of one decoder layer from its input, its output and its weights; for every metric higher is more important."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from qtale.errors import CheckpointError, InputError
from qtale.importance.options import ERROR_BITS, MeasureOptions
from qtale.spec import QuantSpec

if TYPE_CHECKING:
    import torch

Sets = npt.NDArray[np.int32]
# Weights are summed in float32 over pieces of this many, and over pieces in float64.
_PIECE = 1 << 20
# The cosine of a zero vector with any other is taken as zero.
_TINY = 1e-30


class LayerView(Protocol):
    """What a metric sees of the layer that was run last, while its weights are still there."""

    index: int
    num_layers: int

    def states_of_layer(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Input and output of the layer, each float32 [n, length, hidden], some sequences at a time."""

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The Linear weights [out, in] by full module name, float32."""

    def sets(self) -> tuple[Sets, Sets]:
        """Token sets int32 [sequences, positions, k] before and after the layer."""


@dataclass(frozen=True)
class LayerScore:
    """A layer's score by one metric; ``per_sequence`` is empty where no sequence is involved.

    ``errors`` is filled by :class:`Error`: bits → module → |ŵ - w|² / |w|².
    """

    score: float
    per_sequence: tuple[float, ...] = ()
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def mean(cls, per_sequence: list[float]) -> LayerScore:
        """The score that is the mean over sequences."""
        return cls(math.fsum(per_sequence) / len(per_sequence), tuple(per_sequence))


class Metric(Protocol):
    """Anything that scores a layer."""

    def score(self, view: LayerView) -> LayerScore: ...


@dataclass(frozen=True)
class Jaccard:
    """LSAQ: 1 - |A ∩ B| / |A ∪ B| of the token sets before and after the layer (arXiv 2412.18135)."""

    def score(self, view: LayerView) -> LayerScore:
        from qtale import ops

        before, after = view.sets()
        sequences, positions, k = before.shape
        overlap = ops.jaccard(before.reshape(-1, k), after.reshape(-1, k)).reshape(sequences, positions)
        return LayerScore.mean((1 - overlap.astype(np.float64).mean(1)).tolist())


@dataclass(frozen=True)
class Cosine:
    """``offset`` minus the cosine of the layer's input and output, at the last token or averaged over all.

    LIM of LWQ (arXiv 2406.17415) has offset 0, BI of ShortGPT (arXiv 2403.03853) offset 1 and all tokens.
    """

    offset: float
    positions: str

    def score(self, view: LayerView) -> LayerScore:
        import torch

        values: list[float] = []
        for before, after in view.states_of_layer():
            first = slice(-1, None) if self.positions == "last" else slice(None)
            a, b = before[:, first], after[:, first]
            lengths = torch.linalg.vector_norm(a, dim=-1).double() * torch.linalg.vector_norm(b, dim=-1).double()
            cosines = torch.linalg.vecdot(a, b).double() / lengths.clamp_min(_TINY)
            values += (self.offset - cosines.mean(1)).tolist()
        return LayerScore.mean(values)


@dataclass(frozen=True)
class ZScore:
    """ZD of LWQ: minus the share of a layer's weights whose z-score exceeds 1, all its Linears taken together.

    The paper calls layers with a smaller share more important; ``order`` "reversed" takes the opposite. ``tail``
    "both" counts |z| > 1.
    """

    tail: str
    order: str

    def score(self, view: LayerView) -> LayerScore:
        weights = list(view.weights().values())
        count, mean, deviation = _moments(weights)
        above = sum(int((weight > mean + deviation).sum()) for weight in weights)
        if self.tail == "both":
            above += sum(int((weight < mean - deviation).sum()) for weight in weights)
        return LayerScore(above / count if self.order == "reversed" else -above / count)


def _moments(weights: list[torch.Tensor]) -> tuple[int, float, float]:
    """Count, mean and standard deviation of all elements, joined from those of pieces."""
    import torch

    parts = []
    for piece in pieces(weights):
        moments = torch.var_mean(piece, correction=0)
        parts.append((piece.numel(), float(moments[1]), float(moments[0])))
    count = sum(size for size, _, _ in parts)
    mean = math.fsum(size * mean for size, mean, _ in parts) / count
    square = math.fsum(size * (variance + (part - mean) ** 2) for size, part, variance in parts)
    return count, mean, math.sqrt(square / count)


def pieces(weights: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """All elements of some tensors, flat, a million at a time."""
    import torch

    for weight in weights:
        yield from torch.split(weight.reshape(-1), _PIECE)


@dataclass(frozen=True)
class Error:
    """Relative error |ŵ - w| / |w| of rounding a layer's Linears to nearest, Frobenius norms over all of them."""

    options: MeasureOptions
    scale_dtype: str

    def score(self, view: LayerView) -> LayerScore:
        errors: dict[str, dict[str, float]] = {}
        total = 0.0
        weights = view.weights()
        norms = {name: _square(weight) for name, weight in weights.items()}
        for bits in sorted({*ERROR_BITS, self.options.error_bits}, reverse=True):
            squares = {
                name: _square(rounding(name, weight, self.options.spec(bits), self.scale_dtype))
                for name, weight in weights.items()
            }
            errors[str(bits)] = {name: squares[name] / norms[name] if norms[name] else 0.0 for name in weights}
            if bits == self.options.error_bits:
                total = math.fsum(squares.values())
        norm = math.fsum(norms.values())
        return LayerScore(math.sqrt(total / norm) if norm else 0.0, errors=errors)


def rounding(name: str, weight: torch.Tensor, spec: QuantSpec, scale_dtype: str) -> torch.Tensor:
    """ŵ - w of rounding ``weight`` [out, in] float32 to nearest as ``spec`` says; CheckpointError for NaN."""
    from qtale import ops

    group_size = spec.resolve(name, weight.shape[1]).group_size
    try:
        codes, scale, zero_point = ops.quantize(weight, spec.num_bits, group_size, spec.symmetric, scale_dtype)
    except InputError as error:
        raise CheckpointError(f"{name}.weight cannot be quantized: {error}") from error
    return ops.dequantize(codes, scale.float(), zero_point, "float32").sub_(weight)  # type: ignore[no-any-return]


def _square(values: torch.Tensor) -> float:
    return math.fsum(float(piece.norm()) ** 2 for piece in pieces([values]))


@dataclass(frozen=True)
class Random:
    """A number between 0 and 1 that depends on the seed and the layer alone."""

    seed: int

    def score(self, view: LayerView) -> LayerScore:
        return LayerScore(float(np.random.default_rng([self.seed, view.index]).random()))


def make_metrics(options: MeasureOptions, scale_dtype: str) -> dict[str, Metric]:
    """The asked metrics that score a layer by itself, by name; ``scale_dtype`` is that of quantization scales."""
    known: dict[str, Metric] = {
        "jaccard": Jaccard(),
        "lim": Cosine(0.0, options.positions),
        "bi": Cosine(1.0, "all"),
        "zd": ZScore(options.zd_tail, options.zd_order),
        "error": Error(options, scale_dtype),
        "random": Random(options.seed),
    }
    return {name: known[name] for name in options.metrics if name in known}
