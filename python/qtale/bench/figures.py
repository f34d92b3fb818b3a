"""The figures of an engine, each beside the limit that binds it, measured in turn; see benchmarks/README.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from qtale import _core
from qtale.bench.machine import huge_share
from qtale.bench.samples import Paired, paired, quiet_median
from qtale.bench.subject import Decoding, Subject

Row = dict[str, Any]
_PEAK_SECONDS = 0.02
# A sample lasts about this long where one pass is shorter: what disturbs it is then seen by its processor time.
_SAMPLE_SECONDS = 0.02


def make_row(figure: str, value: float, unit: str, result: Paired | None = None, **extra: Any) -> Row:
    """One line of the results: ``value`` is what users feel, ``share`` the ratio that is judged."""
    known = result if result is not None and not math.isnan(result.share) else None
    row: Row = {
        "figure": figure,
        "threads": _core.num_threads(),
        "value": value,
        "unit": unit,
        "share": known.share if known else None,
        "limit": known.limit if known else None,
        "limit_name": None,
        "target": None,
        "at_most": False,
        "ok": None,
        "samples": result.samples if result else 0,
        "disturbed": result.disturbed if result else 0,
    }
    return {**row, **extra}


def judge(row: Row, target: float | None, at_most: bool = False) -> Row:
    """The row with a target that its share is to reach, or not to exceed."""
    share = row["share"]
    reached = None if target is None or share is None else share <= target if at_most else share >= target
    return {**row, "target": target, "at_most": at_most, "ok": reached}


def readers(subject: Subject, repeats: int) -> list[int]:
    """The two readers of the library that stream the weights fastest on the threads in use."""
    rates = [quiet_median(partial(subject.read_rate, i), repeats) for i in range(len(_core.reader_names()))]
    return sorted(range(len(rates)), key=rates.__getitem__)[-2:]


def steps_of(decoding: Decoding, longest: int = 32) -> int:
    """Passes of one sample."""
    seconds = min(decoding.seconds(1) for _ in range(3))
    return max(1, min(longest, decoding.longest, round(_SAMPLE_SECONDS / seconds)))


def decode(subject: Subject, repeats: int) -> Row:
    """Tokens per second of one sequence; its share is bytes per second over the best read of the same memory."""
    chosen, work = readers(subject, max(1, repeats // 3)), subject.work
    with Decoding(subject) as decoding:
        steps = steps_of(decoding)

        def rate() -> float:
            return work.token_bytes * steps / decoding.seconds(steps)

        result = paired(rate, [partial(subject.read_rate, i) for i in chosen], repeats)
    name = f"read, {_core.reader_names()[chosen[result.best]]}"
    extra = {"limit_name": name, "limit_unit": "B/s", "token_bytes": work.token_bytes, "batch": 1}
    extra["huge_pages"] = huge_share(subject.model.arena.bytes)
    return make_row("decode", result.value / work.token_bytes, "tokens/s", result, **extra)


def share_of_tiles(rate: float, seconds: float) -> Row:
    """The peak of AMX's products of bytes and ``rate`` as a share of it; None without AMX."""
    peak = _core.measure_peak("int8_tile", seconds)
    return {"tile_peak": peak, "tile_share": None if peak is None else rate / peak}


def peak_name(tiles: Row) -> str:
    """The integer dot peak, and the share of AMX's where there is one."""
    share = tiles["tile_share"]
    return "int8 dot peak" if share is None else f"int8 dot peak ({share:.3f} of the peak of tiles)"


def prefill(subject: Subject, tokens: int, repeats: int) -> Row:
    """Tokens per second of one prompt; its share is operations of the layers' matrices over the integer dot peak."""
    operations = subject.work.pass_operations(tokens)

    def rate() -> float:
        return operations / subject.prefill_seconds(tokens)

    subject.prefill_seconds(min(tokens, 16))
    result = paired(rate, [partial(_core.measure_peak, "int8_dot", _PEAK_SECONDS)], repeats)
    tiles = share_of_tiles(result.value, _PEAK_SECONDS)
    extra = {"limit_name": peak_name(tiles), "limit_unit": "op/s", "tokens": tokens, **tiles}
    return make_row(f"prefill {tokens}", result.value / operations * tokens, "tokens/s", result, **extra)


def batches(subject: Subject, sizes: Sequence[int], repeats: int) -> list[Row]:
    """Tokens per second by the number of sequences, taken in turn; shares are of the best smaller batch.

    Each row also tells its gain over the smallest batch.
    """
    decodings = {size: Decoding(subject, size) for size in sizes}
    steps = {size: steps_of(decoding) for size, decoding in decodings.items()}
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size, decoding in decodings.items():
            seconds = quiet_median(partial(decoding.seconds, steps[size]), 1)
            taken[size].append(size * steps[size] / seconds)
    for decoding in decodings.values():
        decoding.close()
    rates = {size: float(np.median(found)) for size, found in taken.items()}
    rows = []
    for size in sizes:
        best = max((other for other in sizes if other < size), key=rates.__getitem__, default=None)
        share = None if best is None else float(np.median(np.divide(taken[size], taken[best])))
        gain = float(np.median(np.divide(taken[size], taken[sizes[0]])))
        row = make_row(f"decode batch {size}", rates[size], "tokens/s", samples=repeats, batch=size, gain=gain)
        rows.append({**row, "share": share, "limit_name": None if best is None else f"batch {best}"})
    return rows


def cell(row: Row) -> tuple[str, ...]:
    """A row for people: figure, threads, speed, share, what it is a share of, target, verdict."""
    share = "" if row["share"] is None else f"{row['share']:.3f}"
    target = "" if row["target"] is None else f"{'<= ' if row['at_most'] else ''}{row['target']:.2f}"
    limit = "" if row["limit_name"] is None else str(row["limit_name"])
    if row["limit"] is not None and row.get("limit_unit") in ("B/s", "op/s"):
        limit = f"{row['limit'] / 1e9:.1f} {'GB/s' if row['limit_unit'] == 'B/s' else 'Gop/s'} {limit}"
    verdict = {True: "ok", False: "miss", None: ""}[row["ok"]]
    value = f"{row['value']:.4g} {row['unit']}"
    return (str(row.get("model") or ""), row["figure"], str(row["threads"]), value, share, limit, target, verdict)


HEAD = ("model", "figure", "threads", "speed", "share", "of", "target", "")


def table(rows: Sequence[Row]) -> str:
    """Rows as lines of text."""
    cells = [HEAD, *map(cell, rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEAD))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells)
    return "\n".join(lines)
