"""project_topk and jaccard beside torch on the same threads: time, memory, share of the limit; see README.md."""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from measure import huge_array
from output import publish
from qtale import _core, ops
from qtale.bench import machine, undisturbed, wall
from qtale.errors import Error
from qtale.process import release
from qtale.tensors import memory

Row = dict[str, Any]
FEW_ROWS = 8  # up to which reading the matrix is the limit, and not multiplying
PEAK_SECONDS = 0.005
MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """What is measured: (vocab, depth) of the matrices, rows of x, k, and seconds and samples that a case may take."""

    matrices: tuple[tuple[int, int], ...] = ((49152, 576), (128256, 4096))
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.float32)
    rows: tuple[int, ...] = (1, 32, 128, 1024)
    k: int = 100
    seconds: float = 4.0
    samples: int = 25
    sets: int = 1024


QUICK = Sizes(((1000, 64),), (torch.float16, torch.float32), (1, 32), 10, 0.05, 2, 16)


def matrix_of(vocab: int, depth: int, dtype: torch.dtype) -> torch.Tensor:
    """A random matrix in huge pages where there are some."""
    matrix = torch.from_numpy(huge_array(vocab * depth * dtype.itemsize)).view(dtype).view(vocab, depth)
    generator = torch.Generator().manual_seed(0)
    for block in matrix.split(4096):
        block.copy_(torch.randn(block.shape, generator=generator))
    return matrix


def peers(x: torch.Tensor, matrix: torch.Tensor, k: int) -> dict[str, Callable[[], object]]:
    """The same with torch. Half matrices: exact after a conversion, or with products rounded to half precision."""
    if matrix.dtype == torch.float32:
        return {"topk(x @ W.T)": lambda: torch.topk(x @ matrix.T, k)}
    half = x.to(matrix.dtype)
    return {
        "topk(x @ W.float().T)": lambda: torch.topk(x @ matrix.float().T, k),
        "topk(x.half() @ W.T)": lambda: torch.topk(half @ matrix.T, k),
    }


def status(field: str) -> int:
    """Bytes of one line of /proc/self/status; 0 where there is none."""
    path = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.exists() else None
    return int(found[1]) << 10 if found else 0


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory of the process grew at most during ``run``; None where nobody counts them."""
    release()  # so that taking memory again is seen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    before = status("VmRSS")
    run()
    return max(0, status("VmHWM") - before)


def limit_of(rows: int, matrix: torch.Tensor) -> tuple[str, Callable[[], float | None], float]:
    """Name, units per second and units of one product: bytes read for few rows, operations for more."""
    if rows > FEW_ROWS:
        return "f32_fma", lambda: _core.measure_peak("f32_fma", PEAK_SECONDS), 2.0 * rows * matrix.numel()
    size = matrix.numel() * matrix.element_size()
    # Any of the readers that keep memory busy will do: the best two differ by a few percent.
    readers = _core.reader_names()
    times = [statistics.median(_core.read_seconds([memory(matrix)], i) for _ in range(3)) for i in range(len(readers))]
    best = min(range(len(readers)), key=times.__getitem__)
    return f"read, {readers[best]}", lambda: size / _core.read_seconds([memory(matrix)], best), float(size)


def take_turns(runs: dict[str, Callable[[], float | None]], sizes: Sizes) -> tuple[dict[str, list[float]], int]:
    """Results of all runs in turn until time or samples are used up, three rounds at least; how many were disturbed."""
    results: dict[str, list[float]] = {name: [] for name in runs}
    start, disturbed = time.perf_counter(), 0
    while len(next(iter(results.values()))) < sizes.samples:
        quiet = True
        for name, run in runs.items():
            value, good = undisturbed(run)
            results[name].append(value)
            quiet &= good
        disturbed += not quiet
        if time.perf_counter() - start > sizes.seconds and len(results[name]) >= min(3, sizes.samples):
            break
    return results, disturbed


def projection(x: torch.Tensor, matrix: torch.Tensor, sizes: Sizes) -> Row:
    """project_topk of one size: median seconds, median of the paired ratios, growth of the memory."""
    rivals = peers(x, matrix, sizes.k)
    limit_name, limit, work = limit_of(len(x), matrix)
    ours = lambda: ops.project_topk(x, matrix, sizes.k)  # noqa: E731
    runs: dict[str, Callable[[], float | None]] = {"limit": limit, "qtale": wall(ours)}
    runs.update({name: wall(run) for name, run in rivals.items()})
    for run in (ours, *rivals.values()):
        run()
    results, disturbed = take_turns(runs, sizes)
    best = min(rivals, key=lambda name: statistics.median(results[name]))
    own = results["qtale"]
    speedup = statistics.median(a / b for a, b in zip(results[best], own, strict=True))
    share = statistics.median(work / t / rate for t, rate in zip(own, results["limit"], strict=True))
    return {
        "kernel": "project_topk",
        "vocab": matrix.shape[0],
        "depth": matrix.shape[1],
        "matrix": str(matrix.dtype).removeprefix("torch."),
        "rows": len(x),
        "k": sizes.k,
        "threads": _core.num_threads(),
        "seconds": statistics.median(own),
        "torch": {name: statistics.median(results[name]) for name in rivals},
        "torch_best": best,
        "speedup": speedup,
        "limit": statistics.median(results["limit"]),
        "limit_name": limit_name,
        "share": None if math.isnan(share) else share,
        "memory": peak_memory(ours),
        "torch_memory": peak_memory(rivals[best]),
        "samples": len(own),
        "disturbed": disturbed,
    }


def overlaps(sizes: Sizes, k: int) -> Row:
    """jaccard of random sets of k out of 49152 against Python's sets."""
    generator = np.random.default_rng(0)
    a, b = (generator.integers(0, 49152, (sizes.sets, k), dtype=np.int32) for _ in range(2))

    def by_sets() -> list[float]:
        pairs = ((set(left), set(right)) for left, right in zip(a.tolist(), b.tolist(), strict=True))
        return [len(left & right) / len(left | right) for left, right in pairs]

    results, disturbed = take_turns({"qtale": wall(lambda: ops.jaccard(a, b)), "sets": wall(by_sets)}, sizes)
    speedup = statistics.median(s / q for q, s in zip(results["qtale"], results["sets"], strict=True))
    row: Row = {"kernel": "jaccard", "rows": sizes.sets, "k": k, "threads": _core.num_threads()}
    row.update(seconds=statistics.median(results["qtale"]), python=statistics.median(results["sets"]), speedup=speedup)
    return {**row, "samples": len(results["qtale"]), "disturbed": disturbed}


def cases(threads: tuple[int, ...], sizes: Sizes) -> Iterator[Callable[[], Row]]:
    """The whole benchmark as functions that return a row; a matrix lives as long as its cases."""

    def on(count: int, measure: Callable[[], Row]) -> Row:
        _core.set_num_threads(count)
        torch.set_num_threads(count)
        return measure()

    for vocab, depth in sizes.matrices:
        for dtype in sizes.dtypes:
            matrix = matrix_of(vocab, depth, dtype)
            for count in threads:
                for rows in sizes.rows:
                    x = torch.randn(rows, depth)
                    yield lambda c=count, x=x, m=matrix: on(c, lambda: projection(x, m, sizes))
    for count in threads:
        for k in (sizes.k, 10 * sizes.k):
            yield lambda c=count, k=k: on(c, lambda: overlaps(sizes, k))


def table(result: dict[str, Any]) -> str:
    """The results for people."""
    about = result["machine"]
    lines = [f"{about['cpu']}, kernels: {about['isa']}; torch {result['torch']}; k = {result['results'][0]['k']}", ""]
    lines.append(
        "what, rows x vocab x depth             threads       qtale       torch  faster  share of limit  memory"
    )
    for row in result["results"]:
        if row["kernel"] == "jaccard":
            name, other, rest = f"jaccard k={row['k']}, {row['rows']} pairs", row["python"], "(beside Python's sets)"
        else:
            name = f"topk {row['matrix']}, {row['rows']} x {row['vocab']} x {row['depth']}"
            other = row["torch"][row["torch_best"]]
            sizes = [f"{size / MIB:.0f}" if size is not None else "-" for size in (row["memory"], row["torch_memory"])]
            rest = f"{row['share'] or math.nan:.2f} {row['limit_name']:<18} {sizes[0]} MiB : {sizes[1]} MiB"
        times = f"{row['seconds'] * 1e3:8.2f} ms {other * 1e3:8.2f} ms"
        lines.append(f"{name:<40} {row['threads']:>3}  {times} {row['speedup']:>6.2f}  {rest}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write all results as JSON to FILE; '-' is standard output")
    parser.add_argument("--isa", help="kernels of this instruction set instead of the best one")
    parser.add_argument("--threads", metavar="N[,N…]", default="1", help="thread counts (default: 1)")
    parser.add_argument("--rows", metavar="N[,N…]", help="rows of x (default: 1,32,128,1024)")
    parser.add_argument("--k", type=int, help="how many products of each row (default: 100)")
    parser.add_argument("--small", action="store_true", help="only the smaller vocabulary: half a GiB instead of six")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, not how fast")
    return parser.parse_args()


def sizes_of(args: argparse.Namespace) -> Sizes:
    """What the command line asks for."""
    sizes = QUICK if args.quick else Sizes()
    matrices = sizes.matrices[:1] if args.small else sizes.matrices
    rows = _counts(args.rows) if args.rows else sizes.rows
    return Sizes(matrices, sizes.dtypes, rows, args.k or sizes.k, sizes.seconds, sizes.samples, sizes.sets)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> int:
    """Measures, prints the table, writes the JSON; 1 after an error."""
    args = parse_arguments()
    try:
        if args.isa:
            _core.set_cpu_isa(args.isa)
        sizes = sizes_of(args)
        threads = _counts(args.threads)
        total = len(threads) * (len(sizes.matrices) * len(sizes.dtypes) * len(sizes.rows) + 2)
        rows = [case() for case in tqdm(cases(threads, sizes), "importance", total, file=sys.stderr)]
    except (Error, ValueError) as error:
        print(f"benchmarks/importance.py: error: {error}", file=sys.stderr)
        return 1
    result: dict[str, Any] = {"benchmark": "importance", "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    result.update(machine=machine(), torch=torch.__version__, quick=args.quick, results=rows)
    publish(result, table(result), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
