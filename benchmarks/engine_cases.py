"""What engine.py measures beside the figures of qtale.bench: long prompts, threads, routing, memory, loading."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from qtale import _core
from qtale.bench.figures import Row, judge, make_row, readers, steps_of
from qtale.bench.samples import paired, undisturbed
from qtale.bench.subject import Decoding, Subject
from qtale.engine.arena import Arena
from qtale.engine.layout import WeightOptions
from qtale.engine.model import LoadedModel, LoadOptions
from qtale.engine.passes import CallReport

PIECE = 16 << 20  # of reading a file
SEARCH = 10  # steps of the search for theta
LONG_PROMPT, ROUTED_DECODE, ROUTED_PREFILL = 0.80, 0.95, 0.90
TWO_DECODE, TWO_PREFILL = 0.95, 1.80
KV_SLACK, LOAD = 0.05, 1.5
NEVER_SLOWER = 0.98  # gain over dense; what two runs of the same differ by


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    repeats: int = 15
    slow_repeats: int = 5  # of what takes seconds
    short: int = 512
    long: int = 4096
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    ratios: tuple[float, ...] = (0.75, 0.5, 0.25)
    routed_batches: tuple[int, ...] = (4, 16)


QUICK = Sizes(2, 1, 32, 96, (1, 2), (0.5,), (2,))


def long_prompt(subject: Subject, sizes: Sizes) -> Row:
    """Rate of a long prompt, of that of a short one."""

    def rate(tokens: int) -> float:
        return tokens / subject.prefill_seconds(tokens)

    result = paired(partial(rate, sizes.long), [partial(rate, sizes.short)], (sizes.slow_repeats + 1) // 2)
    row = make_row(f"prefill {sizes.long}", result.value, "tokens/s", result, limit_name=f"prefill {sizes.short}")
    return judge(row, LONG_PROMPT)


def _on(threads: int, run: Callable[[], float]) -> float:
    """``run`` on so many threads, which are started before."""
    _core.set_num_threads(threads)
    _core.measure_peak("f32_fma", 0.0005)
    return undisturbed(run)[0]


def two_threads_prefill(subject: Subject, sizes: Sizes) -> Row:
    """Two threads over one: rate of a prompt."""

    def rate(threads: int) -> float:
        return sizes.short / _on(threads, partial(subject.prefill_seconds, sizes.short))

    result = paired(partial(rate, 2), [partial(rate, 1)], sizes.slow_repeats)
    row = make_row("prefill 2 threads : 1", result.value, "tokens/s", result, limit_name="one thread", threads=2)
    return judge(row, TWO_PREFILL)


def two_threads_decode(subject: Subject, sizes: Sizes) -> Row:
    """Two threads over one: gain in tokens per second over the gain in bandwidth, each with its best reader."""
    best = {}
    for threads in (1, 2):
        _core.set_num_threads(threads)
        best[threads] = readers(subject, max(1, sizes.repeats // 3))[-1]
    gains, reads, rates = [], [], []
    with Decoding(subject) as decoding:
        steps = steps_of(decoding)
        for _ in range(sizes.repeats):
            seconds = [_on(threads, partial(decoding.seconds, steps)) for threads in (1, 2)]
            read = [_on(threads, partial(subject.read_rate, best[threads])) for threads in (1, 2)]
            gains.append(seconds[0] / seconds[1])
            reads.append(read[1] / read[0])
            rates.append(steps / seconds[1])
    row = make_row("decode 2 threads : 1", float(np.median(rates)), "tokens/s", samples=sizes.repeats, threads=2)
    gain, bandwidth = float(np.median(gains)), float(np.median(reads))
    share = float(np.median(np.divide(gains, reads)))
    name = f"{gain:.2f}x, bandwidth {bandwidth:.2f}x"
    return judge({**row, "share": share, "limit_name": name, "gain": gain, "bandwidth_gain": bandwidth}, TWO_DECODE)


class Depth:
    """Ways to run the layers of a model, and the share of a dense pass that each leaves over."""

    def __init__(self, subject: Subject) -> None:
        self._decoder, self._count = subject.passes.decoder, subject.spec.num_layers
        self._work = subject.work

    def dense(self) -> None:
        """All layers, no router."""
        self._decoder.set_depth([True] * self._count)

    def routed(self, theta: float) -> None:
        """As the routers decide."""
        self._decoder.set_depth(None)
        self._decoder.set_theta(theta)

    def static(self, ratio: float) -> float:
        """Layers spread evenly; returns the ratio that whole layers give."""
        kept = max(1, round(ratio * self._count))
        chosen = {i * self._count // kept for i in range(kept)}
        self._decoder.set_depth([i in chosen for i in range(self._count)])
        return kept / self._count

    def executed(self, report: CallReport) -> float:
        """Ratio of the layers that tokens ran."""
        return sum(report.executed) / (report.tokens * self._count)

    def decode_left(self, ratio: float, routers: bool) -> float:
        """Bytes that are read at this ratio over those of all layers and the head, which always runs, as routers do."""
        fixed = self._work.head_bytes + (self._work.router_bytes if routers else 0)
        return (fixed + ratio * sum(self._work.layer_bytes)) / self._work.token_bytes


def find_theta(subject: Subject, ratio: float, tokens: int) -> float:
    """The threshold at which routers let about ``ratio`` of the layers run."""
    depth, low, high = Depth(subject), 0.0, 1.0
    for _ in range(SEARCH):
        report, theta = CallReport(), (low + high) / 2
        depth.routed(theta)
        subject.prefill_seconds(tokens, report)
        low, high = (theta, high) if depth.executed(report) > ratio else (low, theta)
    return (low + high) / 2


def _bounded(dense: list[float], routed: list[float], left: list[float]) -> tuple[float, float]:
    """Median gain over dense, and median of the time that the bound gives over the time it took."""
    gain = np.divide(dense, routed)
    return float(np.median(gain)), float(np.median(gain * np.array(left)))


def routed_decode(subject: Subject, ratio: float, theta: float | None, sizes: Sizes) -> Row:
    """Decoding by routers, or without ``theta`` by a fixed set of layers: the bound's time over that taken."""
    depth = Depth(subject)
    dense, routed, left, ratios = [], [], [], []
    depth.dense()
    with Decoding(subject) as decoding:
        steps = max(8 if theta is not None else 1, steps_of(decoding))
        for _ in range(sizes.repeats):
            depth.dense()
            dense.append(undisturbed(partial(decoding.seconds, steps))[0])
            report, exact = CallReport(), None
            if theta is None:
                exact = depth.static(ratio)
            else:
                depth.routed(theta)
            routed.append(undisturbed(partial(decoding.seconds, steps, report))[0])
            ratios.append(depth.executed(report) if exact is None else exact)
            left.append(depth.decode_left(ratios[-1], exact is None))
    depth.dense()
    gain, share = _bounded(dense, routed, left)
    found = float(np.median(ratios))
    how = "static depth" if theta is None else "routed decode"
    row = make_row(f"{how} r={ratio}", steps / float(np.median(routed)), "tokens/s", samples=sizes.repeats)
    name = f"Amdahl bound at {found:.3f}: {1 / float(np.median(left)):.2f}x, got {gain:.2f}x"
    return judge({**row, "share": share, "limit_name": name, "ratio": found, "gain": gain}, ROUTED_DECODE)


def routed_prefill(subject: Subject, ratio: float, theta: float, sizes: Sizes) -> Row:
    """A prompt by routers: gain over dense, of 1/r."""
    depth = Depth(subject)
    dense, routed, ratios = [], [], []
    for _ in range(sizes.slow_repeats):
        depth.dense()
        dense.append(undisturbed(partial(subject.prefill_seconds, sizes.short))[0])
        depth.routed(theta)
        report = CallReport()
        routed.append(undisturbed(partial(subject.prefill_seconds, sizes.short, report))[0])
        ratios.append(depth.executed(report))
    depth.dense()
    gain, share = _bounded(dense, routed, ratios)
    found = float(np.median(ratios))
    rate = sizes.short / float(np.median(routed))
    row = make_row(f"routed prefill {sizes.short} r={ratio}", rate, "tokens/s", samples=sizes.slow_repeats)
    name = f"1/r at {found:.3f}: {1 / found:.2f}x, got {gain:.2f}x"
    return judge({**row, "share": share, "limit_name": name, "ratio": found, "gain": gain}, ROUTED_PREFILL)


def routed_batch(subject: Subject, batch: int, ratio: float, theta: float, sizes: Sizes) -> Row:
    """Decoding of several sequences by routers: gain over dense."""
    depth = Depth(subject)
    gains, routed, ratios = [], [], []
    depth.dense()
    with Decoding(subject, batch) as decoding:
        steps = max(2, 16 // batch)  # many short samples: what others do hits one of a pair
        for _ in range(sizes.repeats):
            depth.dense()
            dense = undisturbed(partial(decoding.seconds, steps))[0]
            depth.routed(theta)
            report = CallReport()
            routed.append(undisturbed(partial(decoding.seconds, steps, report))[0])
            gains.append(dense / routed[-1])
            ratios.append(depth.executed(report))
    depth.dense()
    found, rate = float(np.median(ratios)), batch * steps / float(np.median(routed))
    row = make_row(f"routed decode batch {batch} r={ratio}", rate, "tokens/s", samples=sizes.repeats)
    row |= {"share": float(np.median(gains)), "limit_name": f"dense, executed {found:.3f}", "ratio": found}
    return judge(row, NEVER_SLOWER)


def kv_memory(subject: Subject, ratio: float, theta: float, tokens: int) -> Row:
    """Bytes of keys and values of a prompt, of those of the dense pass; no more than r + 5 %."""
    depth, reports = Depth(subject), (CallReport(), CallReport())
    depth.dense()
    subject.prefill_seconds(tokens, reports[0])
    depth.routed(theta)
    subject.prefill_seconds(tokens, reports[1])
    depth.dense()
    dense, routed = (sum(report.kv_bytes) for report in reports)
    found = depth.executed(reports[1])
    row = make_row(f"KV bytes r={ratio}", routed / tokens, "bytes/token", samples=1, ratio=found)
    row |= {"share": routed / dense, "limit_name": f"dense, executed {found:.3f}"}
    return judge(row, found + KV_SLACK, at_most=True)


def _read_file(path: Path) -> float:
    """Seconds to read a file into new memory of the kind that weights lie in."""
    start = time.perf_counter()
    target = Arena(path.stat().st_size).bytes.data
    with path.open("rb", buffering=0) as file:
        done = 0
        while count := file.readinto(target[done : done + PIECE]):
            done += count
    return time.perf_counter() - start


def loading(load: Callable[[Path], LoadedModel], cache: Path, sizes: Sizes) -> list[Row]:
    """Seconds to load a model the first time, and from its cache over reading that file."""
    first = load(cache).report.seconds
    # A folder that was kept may hold what earlier versions wrote.
    file = max(cache.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    times, reads = [], []
    for _ in range(max(1, sizes.slow_repeats)):
        reads.append(_read_file(file))
        times.append(load(cache).report.seconds)
    second = float(np.median(times))
    name = f"reading {file.stat().st_size / 1e6:.0f} MB, {float(np.median(reads)):.2f} s"
    share = float(np.median(np.divide(times, reads)))
    row = make_row("load, second time", second, "s", samples=len(times))
    again = judge({**row, "share": share, "limit_name": name}, LOAD, at_most=True)
    return [make_row("load, first time", first, "s", samples=1), again]


def loader(folder: Path, weights: WeightOptions, compute: str = "int8") -> Callable[[Path | None], LoadedModel]:
    """A function that loads a folder, with a cache or without."""
    from qtale.checkpoint.folder import open_folder

    return lambda cache: LoadedModel(open_folder(folder), weights, LoadOptions(compute), cache, False)
