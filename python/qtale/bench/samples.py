"""Timing on machines that are never quite quiet: samples in turn with a limit, of which undisturbed ones count."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qtale import _core

BUSY = 0.93  # share of the wall time that the threads must have run for a sample to count
MAX_TRIES = 4  # times the wanted number of samples, on a machine that is never quiet

Timed = Callable[[], float]


@dataclass(frozen=True)
class Paired:
    """Medians of a kernel and of the limit beside it, in units per second, and of their ratios."""

    value: float
    limit: float
    share: float
    best: int  # which of the limits stood highest
    samples: int
    disturbed: int


def wall(run: Callable[[], object]) -> Timed:
    """``run`` as a function that returns the seconds it took."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return timed


def undisturbed(run: Callable[[], float | None]) -> tuple[float, bool]:
    """The result of ``run`` (NaN for None) and whether its threads really had the processors all the time."""
    start, cpu = time.perf_counter(), time.process_time()
    result = run()
    busy = (time.process_time() - cpu) / ((time.perf_counter() - start) * _core.num_threads())
    return (math.nan if result is None else result), busy >= BUSY


def paired(kernel: Timed, limits: Sequence[Callable[[], float | None]], repeats: int) -> Paired:
    """Rates of ``kernel`` against the best of ``limits``, taken in turn: limits, kernel, limits, kernel, …, limits.

    A sample is the kernel's rate over the mean of the limit before and after it; it counts if all three had the
    processors to themselves. The share is the median sample, for the limit whose median rate is highest.
    """
    before, ratios, rates, disturbed = _rates(limits), [], [], 0
    every: list[tuple[float, list[float]]] = []
    for _ in range(repeats * MAX_TRIES):
        rate, quiet = undisturbed(kernel)
        after = _rates(limits)
        means = [(a + b) / 2 for a, b in zip(before[0], after[0], strict=True)]
        every.append((rate, means))
        if quiet and before[1] and after[1]:
            ratios.append((rate, means))
        else:
            disturbed += 1
        before = after
        if len(ratios) == repeats:
            break
    samples = ratios if len(ratios) >= max(1, repeats // 2) else every
    rates = [statistics.median(means[i] for _, means in samples) for i in range(len(limits))]
    best = max(range(len(limits)), key=rates.__getitem__)
    share = statistics.median(rate / means[best] for rate, means in samples)
    value = statistics.median(rate for rate, _ in samples)
    return Paired(value, rates[best], share, best, len(samples), disturbed)


def _rates(limits: Sequence[Callable[[], float | None]]) -> tuple[list[float], bool]:
    results = [undisturbed(limit) for limit in limits]
    return [rate for rate, _ in results], all(quiet for _, quiet in results)


def quiet_median(run: Timed, repeats: int) -> float:
    """Median result of undisturbed runs, or of all where fewer than half of the wanted ones were."""
    every, quiet = [], []
    for _ in range(repeats * MAX_TRIES):
        result, good = undisturbed(run)
        every.append(result)
        if good:
            quiet.append(result)
        if len(quiet) == repeats:
            break
    return statistics.median(quiet if len(quiet) >= max(1, repeats // 2) else every)
