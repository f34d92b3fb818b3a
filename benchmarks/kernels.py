"""Every kernel as a share of what the machine can do at that moment; see README.md beside this file."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from kernel_cases import (
    KERNELS,
    QUICK,
    Kernel,
    Row,
    Sizes,
    Weights,
    decode,
    median_row,
    prefill,
    prepacking,
    quantize_and_dequantize,
    sweep,
    two_threads,
)
from output import publish
from qtale import _core
from qtale.bench import huge_share, machine, machine_lines
from qtale.errors import Error

PEAKS = ("int8_dot", "int8_tile", "u4_int16", "f32_fma")
GIGA = {"B/s": "GB/s", "op/s": "Gop/s", "weights/s": "Gw/s"}
ELEMENTWISE = (("float32", 4, 128), ("float16", 4, 128), ("float32", 8, 0), ("float16", 8, 0))
PREPACKED = ((4, 128), (8, 0), (3, 128), (2, 128))


def machine_limits(sizes: Sizes) -> Row:
    """The machine's own limits on the threads in use."""
    read, reader, copy = _core.measure_memory(sizes.weights, max(1, sizes.repeats // 3))
    peaks = {name: _core.measure_peak(name, 10 * sizes.peak_seconds) for name in PEAKS}
    return {"threads": _core.num_threads(), "dram_read": read, "reader": reader, "copy": copy, **peaks}


def kernel_rows(kernel: Kernel, threads: list[int], sizes: Sizes, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Everything measured of one prepacked format."""
    parts: dict[str, Any] = {f"decode {kernel.name}": decode, f"rows {kernel.name}": sweep}
    if kernel.prefill is not None:
        parts[f"prefill {kernel.name}"] = prefill
    chosen = [measure for name, measure in parts.items() if wanted(name)]
    if not chosen:
        return
    _core.set_num_threads(max(threads))
    weights = Weights(kernel, sizes)
    for count in threads:
        _core.set_num_threads(count)
        for measure in chosen:
            yield {**measure(weights, sizes), "huge_pages": huge_share(weights.arena)}
    if prefill in chosen and {1, 2} <= set(threads):
        yield two_threads(weights, sizes)


def on_threads(
    name: str, measure: Callable[[], list[Row]], threads: list[int], wanted: Callable[[str], bool]
) -> Iterator[Row]:
    """Rows of ``measure`` on each number of threads, if ``name`` is wanted."""
    for count in threads if wanted(name) else ():
        _core.set_num_threads(count)
        yield from measure()


def tasks(threads: list[int], sizes: Sizes, only: list[str]) -> Iterator[Callable[[], list[Row]]]:
    """The whole benchmark as functions that return rows."""

    def wanted(name: str) -> bool:
        return not only or any(part in name for part in only)

    for kernel in KERNELS:
        yield lambda kernel=kernel: list(kernel_rows(kernel, threads, sizes, wanted))
    for dtype, bits, group in ELEMENTWISE:
        measure = partial(quantize_and_dequantize, dtype, bits, group, sizes)
        yield lambda m=measure, d=dtype: list(on_threads(f"quantize dequantize {d}", m, threads, wanted))
    for bits, group in PREPACKED:
        measure = partial(prepacking, bits, group, sizes)
        yield lambda m=measure, b=bits: list(on_threads(f"prepack unprepack W{b}", m, threads, wanted))


def run(threads: list[int], sizes: Sizes, only: list[str], runs: int) -> dict[str, Any]:
    """All results as one JSON object; rates per second in bytes, operations, rows or weights."""
    result: dict[str, Any] = {
        "benchmark": "kernels",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine(),
    }
    result.update(quick=sizes is QUICK, runs=runs, limits=[], results=[])
    for count in threads:
        _core.set_num_threads(count)
        result["limits"].append(machine_limits(sizes))
    found: dict[tuple[str, int], list[Row]] = {}
    for task in tqdm(list(tasks(threads, sizes, only)) * runs, desc="kernels", file=sys.stderr):
        for row in task():
            found.setdefault((row["kernel"], row["threads"]), []).append(row)
    rows = [median_row(same) for same in found.values()]
    result["results"] += [{**row, "target": None, "ok": None} for row in rows] if result["quick"] else rows
    return result


def verdict(row: Row) -> str:
    """'ok', 'miss' or nothing where there is no target."""
    return {True: "ok", False: "miss", None: ""}[row["ok"]]


def amount(value: float | None, unit: str) -> str:
    """'38.4 GB/s', or '-' for what was not measured."""
    if value is None:
        return "-"
    return f"{value / 1e9:.1f} {GIGA[unit]}" if unit in GIGA else f"{value:.0f} {unit}"


def table(result: dict[str, Any]) -> str:
    """The results for people."""
    lines = machine_lines(result["machine"])
    for limit in result["limits"]:
        peaks = ", ".join(f"{name} {amount(limit[name], 'op/s')}" for name in PEAKS)
        lines.append(
            f"limits, {limit['threads']} thread(s): read {amount(limit['dram_read'], 'B/s')} "
            f"({limit['reader']}), copy {amount(limit['copy'], 'B/s')}, {peaks}"
        )
    shares = [row["huge_pages"] for row in result["results"] if row.get("huge_pages") is not None]
    if shares:
        lines.append(f"weights in huge pages: {min(shares):.0%} at least")
    head = ("kernel", "threads", "speed", "limit beside it", "share", "target", "")
    cells = [head]
    for row in result["results"]:
        limit = f"{amount(row['limit'], row['unit'])} {row['limit_name']}".strip(" -")
        share = "" if row["share"] is None else f"{row['share']:.3f}"
        target = "" if row["target"] is None else f"{row['target']:.2f}"
        speed = amount(row["value"], row["unit"])
        cells.append((row["kernel"], str(row["threads"]), speed, limit, share, target, verdict(row)))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines += [
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells),
    ]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write all results as JSON to FILE; '-' is standard output")
    parser.add_argument("--isa", help="kernels of this instruction set instead of the best one")
    parser.add_argument("--threads", metavar="N[,N…]", help="thread counts (default: 1 and 2)")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="medians of so many runs of everything")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that everything runs, not how fast")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="only what has TEXT in its name, such as 'decode', 'W4 g64', 'quantize'; repeatable",
    )
    return parser.parse_args()


def thread_counts(text: str | None) -> list[int]:
    """Thread counts in rising order: those asked for, else one and two where there are two CPUs."""
    if text is None:
        return [1, 2] if _core.num_threads() > 1 else [1]
    return sorted({int(part) for part in text.split(",")})


def main() -> int:
    """Measures, prints the table, writes the JSON; 1 after an error."""
    args = parse_arguments()
    try:
        if args.isa:
            _core.set_cpu_isa(args.isa)
        result = run(thread_counts(args.threads), QUICK if args.quick else Sizes(), args.only, max(1, args.runs))
    except (Error, ValueError) as error:
        print(f"benchmarks/kernels.py: error: {error}", file=sys.stderr)
        return 1
    publish(result, table(result), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
