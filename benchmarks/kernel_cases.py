"""What kernels.py measures: products with prepacked weights, quantize and dequantize, prepack."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from measure import ALIGNMENT, Array, huge_array
from qtale import _core
from qtale.bench import Paired, paired, quiet_median, wall
from qtale.bench.figures import peak_name, share_of_tiles
from qtale.tensors import memory

OUT, IN = 5632, 2048  # one matrix
MOST_ROWS = 16  # of decode
FALL = 0.02  # rows per second may seem to fall by this much: the noise of medians
COPY = 0.7  # quantize and dequantize, of copying
BLOCKS = 3  # that quantize, dequantize and copies take in turn, so that no cache holds the next one
TWO_THREADS = 1.8  # prefill, of one thread
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured: bytes of weights in all and per sample, elements of the matrix to quantize.

    A sample is short, so that it has a chance to pass undisturbed; it takes the weights that were touched longest ago.
    """

    weights: int = 300 << 20
    sample: int = 48 << 20
    elements: int = 16 << 20
    repeats: int = 25
    prefill: int = 512
    peak_seconds: float = 0.005


QUICK = Sizes(12 << 20, 12 << 20, 1 << 18, 2, 24, 0.0005)


@dataclass(frozen=True)
class Kernel:
    """One prepacked format and mode, with the shares it has to reach per instruction set (prefill None: skipped)."""

    bits: int
    group: int  # 0: per channel
    compute: str
    decode: dict[str, float] = field(default_factory=dict)
    prefill: dict[str, float] | None = None

    @property
    def name(self) -> str:
        """'W4 g128 int8'."""
        return f"W{self.bits} {f'g{self.group}' if self.group else 'channel'} {self.compute}"


KERNELS = (
    Kernel(4, 32, "int8", {"avx512": 0.88, "avx2": 0.82}, {}),
    Kernel(4, 64, "int8", {"avx512": 0.92, "avx2": 0.85}, {"avx512": 0.75, "avx2": 1.20}),
    Kernel(4, 128, "int8", {"avx512": 0.92, "avx2": 0.85}, {"avx512": 0.75, "avx2": 1.20}),
    Kernel(8, 0, "int8", {"avx512": 0.92, "avx2": 0.86}, {"avx512": 0.85, "avx2": 0.70}),
    Kernel(3, 128, "int8", {"avx512": 0.85, "avx2": 0.70}),
    Kernel(2, 128, "int8"),
    Kernel(4, 128, "int16", {}, {}),
    Kernel(4, 128, "float", {"avx512": 0.85, "avx2": 0.55}),
)


def target_of(targets: dict[str, float]) -> float | None:
    """The share to reach with the kernels in use; what BF16 and AMX add has the targets of AVX-512."""
    return targets.get(_core.cpu_isa().split("_")[0]) if _core.num_threads() == 1 else None


class Weights:
    """Equal prepacked matrices in huge pages, one behind the other: as many as fill ``size`` bytes, two at least."""

    def __init__(self, kernel: Kernel, sizes: Sizes) -> None:
        groups = IN // kernel.group if kernel.group else 1
        generator = np.random.default_rng(0)
        half = 1 << (kernel.bits - 1)
        codes = generator.integers(-half, half, (OUT, IN), dtype=np.int8)
        scale = generator.uniform(0.01, 0.02, (OUT, groups)).astype(np.float16)
        self.kernel = kernel
        self.nbytes = _core.prepacked_bytes(OUT, IN, groups, kernel.bits, True, "float16")
        stride = -(-self.nbytes // ALIGNMENT) * ALIGNMENT
        count = max(2, sizes.weights // stride)
        self.arena = huge_array(stride * count)
        parts = [self.arena[i * stride : i * stride + self.nbytes] for i in range(count)]
        _core.prepack(memory(codes), memory(scale), None, kernel.bits, memory(parts[0]))
        for part in parts[1:]:
            part[:] = parts[0]
        self.memories = [memory(part) for part in parts]
        self.per_sample = max(1, sizes.sample // stride)
        self.x = generator.standard_normal((max(sizes.prefill, MOST_ROWS), IN), dtype=np.float32)
        self.y = matrix((len(self.x), OUT), "float32")  # begins on a cache line, as torch's memory does
        self.call_seconds = quiet_median(wall(partial(self._multiply, 0, self.memories)), 9) / count

    def _multiply(self, rows: int, memories: list[Any]) -> None:
        x = (self.x.ctypes.data, "float32", (rows, IN), (IN, 1), -1)
        y = (self.y.ctypes.data, "float32", (rows, OUT), (OUT, 1), -1)
        for weight in memories:
            _core.qmatmul(x, weight, None, y, self.kernel.compute)

    def take(self, count: int) -> list[Any]:
        """The ``count`` matrices that were used longest ago."""
        taken = self.memories[:count]
        self.memories = self.memories[count:] + taken
        return taken

    def seconds(self, rows: int, count: int) -> float:
        """Seconds of x @ weight.T with ``count`` matrices, less what Python and the binding cost per call."""
        return wall(partial(self._multiply, rows, self.take(count)))() - self.call_seconds * count

    def decode_rate(self) -> float:
        """Bytes of weights per second at one row."""
        return self.nbytes * self.per_sample / self.seconds(1, self.per_sample)

    def read_rate(self, reader: int) -> float:
        """Bytes of weights per second by a reader of the library."""
        return self.nbytes * self.per_sample / float(_core.read_seconds(self.take(self.per_sample), reader))

    def prefill_rate(self, rows: int) -> float:
        """Operations per second at many rows."""
        return 2.0 * rows * OUT * IN / self.seconds(rows, 1)


def make_row(name: str, unit: str, result: Paired, limit: str, target: float | None, **extra: Any) -> Row:
    """One line of the results; NaN (a limit that was not measured) becomes None."""
    share = None if math.isnan(result.share) else result.share
    return {
        "kernel": name,
        "threads": _core.num_threads(),
        "value": result.value,
        "unit": unit,
        "limit": None if math.isnan(result.limit) else result.limit,
        "limit_name": limit,
        "share": share,
        "target": target,
        "ok": None if target is None or share is None else share >= target,
        "samples": result.samples,
        "disturbed": result.disturbed,
        **extra,
    }


def decode(weights: Weights, sizes: Sizes) -> Row:
    """One row, against the better of the two readers that stream these weights fastest."""
    names = _core.reader_names()
    rates = [quiet_median(partial(weights.read_rate, i), max(1, sizes.repeats // 3)) for i in range(len(names))]
    chosen = sorted(range(len(names)), key=rates.__getitem__)[-2:]
    result = paired(weights.decode_rate, [partial(weights.read_rate, i) for i in chosen], sizes.repeats)
    target = target_of(weights.kernel.decode)
    return make_row(
        f"decode {weights.kernel.name}", "B/s", result, f"read, {names[chosen[result.best]]}", target, rows=1
    )


def prefill(weights: Weights, sizes: Sizes) -> Row:
    """Many rows: a share of the integer dot peak."""
    peak = partial(_core.measure_peak, "int8_dot", sizes.peak_seconds)
    result = paired(partial(weights.prefill_rate, sizes.prefill), [peak], sizes.repeats)
    target = target_of(weights.kernel.prefill or {})
    name = f"prefill {weights.kernel.name}"
    tiles = share_of_tiles(result.value, sizes.peak_seconds)
    return make_row(name, "op/s", result, peak_name(tiles), target, rows=sizes.prefill, **tiles)


def two_threads(weights: Weights, sizes: Sizes) -> Row:
    """Prefill with two threads over prefill with one."""

    def rate(threads: int) -> float:
        _core.set_num_threads(threads)
        weights.seconds(1, 1)  # starts the threads
        return weights.prefill_rate(sizes.prefill)

    result = paired(partial(rate, 2), [partial(rate, 1)], sizes.repeats)
    _core.set_num_threads(2)
    return make_row(f"prefill {weights.kernel.name} 2 threads : 1", "op/s", result, "one thread", TWO_THREADS)


def sweep(weights: Weights, sizes: Sizes) -> Row:
    """Rows per second from one row to sixteen, each against the best with fewer rows."""
    count, repeats = weights.per_sample, max(1, sizes.repeats // 2)
    taken: dict[int, list[float]] = {rows: [] for rows in range(1, MOST_ROWS + 1)}
    for _ in range(repeats):
        for rows, seconds in taken.items():
            seconds.append(quiet_median(partial(weights.seconds, rows, count), 1))
    rates = {rows: rows * count / float(np.median(seconds)) for rows, seconds in taken.items()}
    steps = []
    for rows in range(2, MOST_ROWS + 1):
        best = max(range(1, rows), key=rates.__getitem__)
        ratios = [rows * a / (best * b) for a, b in zip(taken[best], taken[rows], strict=True)]
        steps.append(
            {"rows": rows, "rows_per_second": rates[rows], "best_smaller": best, "ratio": float(np.median(ratios))}
        )
    return sweep_row(weights.kernel.name, steps, repeats)


def sweep_row(name: str, steps: list[Row], samples: int) -> Row:
    """The worst step."""
    worst = min(steps, key=lambda step: step["ratio"])
    rate: float = worst["rows_per_second"]
    result = Paired(rate, rate / worst["ratio"], worst["ratio"], 0, samples, 0)
    limit = f"M={worst['rows']} against M={worst['best_smaller']}"
    return make_row(f"rows 1-{MOST_ROWS} {name}", "rows/s", result, limit, 1.0 - FALL, steps=steps)


def median_row(rows: list[Row]) -> Row:
    """What several runs say of one kernel: the run whose share is the median, for sweeps the medians of every step."""
    middle = sorted(rows, key=lambda row: row["share"] or row["value"])[len(rows) // 2]
    if "steps" not in middle:
        return middle
    steps = []
    for same in zip(*(row["steps"] for row in rows), strict=True):
        ratios = [step["ratio"] for step in same]
        step = sorted(same, key=lambda step: step["ratio"])[len(same) // 2]
        steps.append({**step, "ratio": float(np.median(ratios))})
    merged = sweep_row("", steps, sum(row["samples"] for row in rows))
    return {
        **middle,
        **{key: merged[key] for key in ("value", "limit", "limit_name", "share", "ok", "samples", "steps")},
    }


def copy_limit(size: int) -> Callable[[], float]:
    """Bytes read and written per second by a copy past the caches; each moves other ``size`` bytes."""
    half = size // 2 // ALIGNMENT * ALIGNMENT
    pairs = deque((huge_array(half), huge_array(half)) for _ in range(BLOCKS))

    def rate() -> float:
        pairs.rotate()
        return 2 * half / float(_core.copy_seconds(memory(pairs[0][0]), memory(pairs[0][1])))

    return rate


def matrix(shape: tuple[int, int], dtype: str) -> Array:
    """A matrix in huge pages."""
    return huge_array(int(np.prod(shape)) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)


class Block:
    """A weight and what quantize makes of it; outputs are reused, so no page is new."""

    def __init__(self, dtype: str, group: int, sizes: Sizes) -> None:
        shape = (max(1, sizes.elements // IN), IN)
        self.weight, self.codes = matrix(shape, dtype), matrix(shape, "int8")
        self.scale = np.empty((shape[0], IN // group if group else 1), dtype)
        self.weight[:] = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        self.nbytes = self.weight.nbytes + self.codes.nbytes + self.scale.nbytes

    def quantize(self, bits: int) -> None:
        """Weight to codes and scale."""
        _core.quantize(memory(self.weight), bits, memory(self.codes), memory(self.scale), None)

    def dequantize(self, bits: int) -> None:
        """Codes and scale to weight; every width is a byte a code here."""
        _core.dequantize(memory(self.codes), memory(self.scale), None, memory(self.weight))


def quantize_and_dequantize(dtype: str, bits: int, group: int, sizes: Sizes) -> list[Row]:
    """Both against a copy of as many bytes as they read and write; every sample takes another block."""
    blocks = deque(Block(dtype, group, sizes) for _ in range(BLOCKS))
    limit = copy_limit(blocks[0].nbytes)
    target = COPY if _core.num_threads() == 2 else None

    def rate(run: Callable[[Block, int], None]) -> float:
        blocks.rotate()
        return blocks[0].nbytes / wall(partial(run, blocks[0], bits))()

    rows = []
    for run in (Block.quantize, Block.dequantize):
        result = paired(partial(rate, run), [limit], sizes.repeats)
        label = f"{run.__name__} {dtype} W{bits} {f'g{group}' if group else 'channel'}"
        rows.append(make_row(label, "B/s", result, "copy", target))
    return rows


def prepacking(bits: int, group: int, sizes: Sizes) -> list[Row]:
    """prepack and unprepack of one matrix, in weights per second."""
    groups = IN // group if group else 1
    codes, scale = matrix((OUT, IN), "int8"), np.ones((OUT, groups), np.float16)
    buffer = huge_array(_core.prepacked_bytes(OUT, IN, groups, bits, True, "float16"))
    rows = []
    for name, run in (
        ("prepack", lambda: _core.prepack(memory(codes), memory(scale), None, bits, memory(buffer))),
        ("unprepack", lambda: _core.unprepack(memory(buffer), memory(codes), memory(scale), None)),
    ):
        value = codes.size / quiet_median(wall(run), sizes.repeats)
        result = Paired(value, math.nan, math.nan, 0, sizes.repeats, 0)
        rows.append(make_row(f"{name} W{bits} {f'g{group}' if group else 'channel'}", "weights/s", result, "", None))
    return rows
