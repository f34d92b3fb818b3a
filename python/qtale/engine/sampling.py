"""Choosing tokens from logits, in numpy: greedy, or drawn after the usual filters in transformers' order."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qtale.errors import Error, InputError

Floats = npt.NDArray[np.float32]
# Candidates that top_p looks at first; most models put nearly all of their probability there.
_LIKELY = 2048


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: ``temperature`` 0 takes the largest logit (the first of equals), above 0 one is drawn.

    Filters apply in this order, as in transformers: ``repetition_penalty`` (Keskar et al., 2019; also when greedy),
    temperature, ``top_k`` (0: off), ``top_p`` (Holtzman et al., 2020; 1: off), ``min_p`` (0: off).
    Raises InputError for values outside of these.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        self._check("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more")
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        self._check("top_k", self.top_k, whole and self.top_k >= 0, "a whole number, 0 for off")
        self._check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        self._check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0")

    @staticmethod
    def _check(name: str, value: float, fits: bool, accepted: str) -> None:
        if not (fits and math.isfinite(value)):
            raise InputError(f"generate: {name} {value!r} is not accepted; it must be {accepted}.")


@dataclass
class TokenSource:
    """What the choice of a sequence's next token depends on beside its logits: its own random numbers, its tokens."""

    generator: np.random.Generator
    seen: set[int] = field(default_factory=set)


def token_sources(count: int, seed: int | Sequence[int] | None) -> list[TokenSource]:
    """Independent sources; a sequence draws the same whatever runs beside it.

    With one seed, sequence i takes the key (seed, i); with a list, sequence i takes (seed_i, 0), as if alone.
    """
    if seed is None:
        seed = secrets.randbits(63)
    if isinstance(seed, (list, tuple)):
        if len(seed) != count:
            raise InputError(f"generate: {len(seed)} seeds for {count} prompts; give one seed, or one for each.")
        keys = [(_checked(each), 0) for each in seed]
    else:
        keys = [(_checked(seed), index) for index in range(count)]
    return [TokenSource(np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))) for key in keys]


def _checked(seed: object) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 1 << 64:
        raise InputError(f"generate: seed {seed!r} must be an integer from 0 to 2^64 - 1.")
    return int(seed)


def choose(logits: Floats, sources: Sequence[TokenSource], options: Sampling) -> list[int]:
    """The next token of each row of logits [n, vocab], which may be overwritten; Error where they are NaN."""
    if options.repetition_penalty != 1.0:
        _penalize(logits, sources, options.repetition_penalty)
    largest = logits.argmax(axis=1)
    if not np.isfinite(logits[np.arange(len(logits)), largest]).all():
        raise Error(
            "generate: the model gave logits that are no finite numbers; its weights or caches overflow. Try compute="
            "'float' and kv_dtype='float32'."
        )
    # Also temperatures that float32 has no number for.
    if np.float32(options.temperature) == 0.0:
        return [int(token) for token in largest]
    filtered = _filter(logits, options)
    return [_draw(row, source.generator) for row, source in zip(filtered, sources, strict=True)]


def _penalize(logits: Floats, sources: Sequence[TokenSource], penalty: float) -> None:
    factor = np.float32(penalty)
    for row, source in zip(logits, sources, strict=True):
        seen = np.fromiter(source.seen, dtype=np.int64, count=len(source.seen))
        values = row[seen]
        row[seen] = np.where(values < 0, values * factor, values / factor)


def _filter(logits: Floats, options: Sampling) -> Floats:
    """Logits over temperature, those that are filtered out at minus infinity."""
    logits -= logits.max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        logits /= np.float32(options.temperature)
    if 0 < options.top_k < logits.shape[1]:
        least = np.partition(logits, -options.top_k, axis=1)[:, [-options.top_k]]
        logits[logits < least] = -np.inf
    if options.top_p < 1.0:
        for row in logits:
            _keep_top_p(row, options.top_p)
    if options.min_p > 0.0:
        # The largest logit is 0, so the share of the largest probability is exp(logit).
        logits[np.exp(logits) < np.float32(options.min_p)] = -np.inf
    return logits


def _keep_top_p(row: Floats, top_p: float) -> None:
    """Keep the smallest set of most likely tokens whose probability reaches ``top_p``, at least one."""
    total = float(np.exp(row).sum(dtype=np.float64))
    size = row.size
    least = np.partition(row, size - _LIKELY)[size - _LIKELY] if size > _LIKELY else np.float32(-np.inf)
    order = _sorted(row, np.flatnonzero(row >= least))
    sums = np.cumsum(np.exp(row[order]), dtype=np.float64)
    if sums[-1] < top_p * total and order.size < size:
        order = _sorted(row, np.arange(size))
        sums = np.cumsum(np.exp(row[order]), dtype=np.float64)
    # A token stays while those before it have not reached top_p.
    kept = 1 + int(np.searchsorted(sums[:-1], top_p * total, side="left"))
    values = row[order[:kept]]
    row[:] = -np.inf
    row[order[:kept]] = values


def _sorted(row: Floats, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Ascending tokens by falling logit, the larger index first among equals, as a reversed ascending sort has them."""
    return tokens[np.argsort(row[tokens], kind="stable")[::-1]]


def _draw(row: Floats, generator: np.random.Generator) -> int:
    """One token by its probability: the first whose cumulative sum passes a uniform number."""
    sums = np.cumsum(np.exp(row), dtype=np.float64)
    index = int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))
    # Rounding may reach past the last token that has any probability.
    return index if index < sums.size and row[index] > -np.inf else int(np.flatnonzero(row > -np.inf)[-1])
