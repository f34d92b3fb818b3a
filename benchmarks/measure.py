"""What the benchmarks share: huge-page memory, samples that nobody disturbed, a description of the machine."""

from __future__ import annotations

import math
import mmap
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qtale import _core

ALIGNMENT = 64
HUGE_PAGE = 2 << 20
BUSY = 0.93  # share of the wall time that the threads must have run for a sample to count
MAX_TRIES = 4  # times the wanted number of samples, on a machine that is never quiet

Array = np.ndarray[Any, Any]
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


def huge_array(size: int) -> Array:
    """``size`` bytes of touched memory that begin on a huge page, in huge pages where the system grants them."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # Python's default is shared memory, which gets no huge pages
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    start = -array.ctypes.data % HUGE_PAGE
    array = array[start : start + size]
    array.fill(0)
    return array


def huge_share(array: Array) -> float | None:
    """Part of the array's mapping that lies in huge pages, by /proc/self/smaps; None where there is no such file."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return None
    address, inside, sizes = array.ctypes.data, False, {"Rss": 0, "AnonHugePages": 0}
    for line in smaps.read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            inside = int(span[1], 16) < address + array.nbytes and int(span[2], 16) > address
        elif inside and line.partition(":")[0] in sizes:
            sizes[line.partition(":")[0]] += int(line.split()[1])
    return sizes["AnonHugePages"] / sizes["Rss"] if sizes["Rss"] else None


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


def machine() -> dict[str, Any]:
    """Processor, instruction sets, system and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "family": fields.get("cpu family"),
        "model": fields.get("model"),
        "cpus": _core.num_threads(),
        "isa": _core.cpu_isa(),
        "isas": _core.cpu_isas(),
        "system": f"{platform.system()} {platform.release()}",
        "huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "qtale": _core.build_info(),
    }
