"""Choosing tokens from logits, by the core: greedy, or drawn after the usual filters in transformers' order."""

from __future__ import annotations

import math
import numbers
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qtale import _core
from qtale.errors import InputError
from qtale.tensors import memory

Floats = npt.NDArray[np.float32]
_MOST_TOKENS = 2**31 - 1


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
        self._check("temperature", lambda value: value >= 0, "0 (greedy) or more")
        self._check("top_k", lambda value: value >= 0, "a whole number, 0 for off", whole=True)
        self._check("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1")
        self._check("min_p", lambda value: 0 <= value <= 1, "from 0 to 1")
        self._check("repetition_penalty", lambda value: 1e-30 <= value <= 1e30, "from 1e-30 to 1e30")

    def _check(self, name: str, fits: Callable[[float], bool], accepted: str, whole: bool = False) -> None:
        value = getattr(self, name)
        if not (_is_number(value, whole) and fits(value)):
            raise InputError(f"generate: {name} {value!r} is not accepted; it must be {accepted}.")


def _is_number(value: object, whole: bool) -> bool:
    # True counts as 1 elsewhere in Python; here it is a mistake.
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        return False
    try:
        return whole or math.isfinite(value)
    except OverflowError:
        # A whole number that no float is as large as.
        return False


def token_sources(count: int, seed: int | Sequence[int] | None) -> list[_core.TokenSource]:
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
    return [_core.TokenSource(*key) for key in keys]


def _checked(seed: object) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 1 << 64:
        raise InputError(f"generate: seed {seed!r} must be an integer from 0 to 2^64 - 1.")
    return int(seed)


def choose(logits: Floats, sources: Sequence[_core.TokenSource], options: Sampling, num_threads: int = 0) -> list[int]:
    """The next token of each row of logits [n, vocab], which may be overwritten; Error where they are NaN.

    ``num_threads`` is 0 for as many as the process uses.
    """
    filters = (
        float(options.temperature),
        # More than there are tokens is as good as all of them, and fits the core's integers.
        min(int(options.top_k), _MOST_TOKENS),
        float(options.top_p),
        float(options.min_p),
        float(options.repetition_penalty),
    )
    return _core.sample(memory(logits), list(sources), filters, num_threads)
