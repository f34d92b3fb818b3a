"""The weight solvers as a share of the float32 FMA peak, beside the same work in vectorised torch; see README.md."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from output import publish
from qtale import _core, ops, solve
from qtale.bench import machine, machine_lines
from qtale.errors import Error

SHAPES = ((576, 576, 64), (1536, 576, 64), (576, 1536, 64), (2048, 2048, 128), (2048, 5632, 128))
QUICK = ((40, 64, 32),)
BITS = 4
STEPS = 29
SAMPLES = 1024
BLOCK = 128

Row = dict[str, Any]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """A weight, its Gram matrix, round-to-nearest codes, and what the solvers need of them."""

    weight: torch.Tensor
    hessian: torch.Tensor
    factor: torch.Tensor
    order: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    x: torch.Tensor
    group_size: int

    @staticmethod
    def make(rows: int, columns: int, group_size: int) -> Layer:
        """Seeded, well conditioned."""
        generator = torch.Generator().manual_seed(rows + columns)
        x = torch.randn(SAMPLES, columns, generator=generator) * torch.rand(columns, generator=generator)
        weight = torch.randn(rows, columns, generator=generator)
        hessian = x.T @ x / SAMPLES + 0.1 * torch.eye(columns)
        order = torch.argsort(torch.diagonal(hessian), descending=True)
        inverse = torch.linalg.inv(hessian[order][:, order].double())
        factor = torch.linalg.cholesky(inverse, upper=True).float().contiguous()
        codes, scale, _ = ops.quantize(weight, BITS, group_size)
        return Layer(weight, hessian, factor, order.int(), codes, scale, x, group_size)

    @property
    def column_scales(self) -> torch.Tensor:
        """[columns, rows] in the order of visits."""
        return self.scale.T.repeat_interleave(self.group_size, 0)[self.order.long()]


def torch_gptq(layer: Layer) -> torch.Tensor:
    """Blocks of 128 columns of the transposed weight, a lazy update of the rest."""
    w, u, scales = layer.weight.T[layer.order.long()].clone(), layer.factor, layer.column_scales
    codes = torch.empty_like(w)
    for begin in range(0, len(w), BLOCK):
        end = min(begin + BLOCK, len(w))
        errors = torch.empty(end - begin, w.shape[1])
        for c in range(begin, end):
            codes[c] = (w[c] / scales[c]).round().clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
            errors[c - begin] = (w[c] - codes[c] * scales[c]) / u[c, c]
            w[c + 1 : end].addr_(u[c, c + 1 : end], errors[c - begin], alpha=-1)
        w[end:].addmm_(u[begin:end, end:].T, errors, alpha=-1)
    return codes


def torch_refine(layer: Layer) -> torch.Tensor:
    """One sweep of coordinate descent on the transposed weight, gradients updated by blocks."""
    order, scales = layer.order.long(), layer.column_scales
    h = layer.hessian[order][:, order]
    codes = layer.codes.T[order].float()
    slope = h @ (layer.weight.T[order] - codes * scales)
    for begin in range(0, len(h), BLOCK):
        end = min(begin + BLOCK, len(h))
        moves = torch.empty(end - begin, slope.shape[1])
        for c in range(begin, end):
            wanted = (codes[c] + slope[c] / (h[c, c] * scales[c])).round()
            new = wanted.clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
            moves[c - begin] = (new - codes[c]) * scales[c]
            codes[c] = new
            slope[c + 1 : end].addr_(h[c, c + 1 : end], moves[c - begin], alpha=-1)
        slope[end:].addmm_(h[end:, begin:end], moves, alpha=-1)
    return codes


def torch_refit(layer: Layer) -> torch.Tensor:
    """Normal equations by groups, a batched solve."""
    rows, columns = layer.weight.shape
    groups, z, h = columns // layer.group_size, layer.codes.T.float(), layer.hessian
    a = torch.empty(groups, groups, rows)
    for g in range(groups):
        part = slice(g * layer.group_size, (g + 1) * layer.group_size)
        a[g] = ((h[:, part] @ z[part]) * z).view(groups, layer.group_size, rows).sum(1)
    b = ((h @ layer.weight.T) * z).view(groups, layer.group_size, rows).sum(1)
    return torch.linalg.solve(a.permute(2, 0, 1).double(), b.T.double())


def torch_search(layer: Layer) -> torch.Tensor:
    """All ranges of all groups, one after the other."""
    w = layer.weight.view(len(layer.weight), -1, layer.group_size)
    importance = torch.diagonal(layer.hessian).reshape(-1, layer.group_size)
    widest = w.abs().amax(-1, keepdim=True) / ((2**BITS - 1) / 2)
    best, least = widest.clone(), torch.full_like(widest, torch.inf)
    for factor in torch.linspace(1.1, 0.4, STEPS):
        scale = widest * factor
        error = w - (w / scale).round_().clamp_(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1) * scale
        found = (error.square_() * importance).sum(-1, keepdim=True)
        best, least = torch.where(found < least, scale, best), torch.minimum(found, least)
    return best


def torch_prox(layer: Layer, step: float) -> torch.Tensor:
    """By sorting (Duchi et al. 2008)."""
    magnitudes = layer.weight.abs().sort(-1, descending=True).values.cumsum(-1)
    counts = torch.arange(1, layer.weight.shape[1] + 1)
    threshold = ((magnitudes - step) / counts).amax(-1, keepdim=True).clamp_(min=0)
    return torch.maximum(torch.minimum(layer.weight, threshold), -threshold)


def torch_gram(x: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """gram += x^T x; bfloat16 is widened first, once."""
    wide = x.float()
    return gram.add_(wide.T @ wide)


def torch_rounding_loss(layer: Layer) -> float:
    """tr(D H D^T)."""
    codes, scale, _ = ops.quantize(layer.weight, BITS, layer.group_size)
    d = ops.dequantize(codes, scale) - layer.weight
    return float(((d @ layer.hessian) * d).sum())


def cases(layer: Layer) -> list[tuple[str, float, Call, Call]]:
    """Name, operations of the products (0: it has none), the solver, the same in torch."""
    w, h, size = layer.weight, layer.hessian, layer.group_size
    rows, columns = (float(n) for n in w.shape)
    square = rows * columns * columns
    gram = torch.zeros(int(columns), int(columns), dtype=torch.float64)
    diagonal = torch.diagonal(h).contiguous()
    rounded = layer.x.bfloat16()
    return [
        (
            "gptq",
            square,
            lambda: solve.gptq(w, layer.factor, BITS, scale=layer.scale, order=layer.order),
            lambda: torch_gptq(layer),
        ),
        (
            "refine_codes, one sweep",
            2 * square,
            lambda: solve.refine_codes(w, h, BITS, layer.codes, layer.scale, order=layer.order),
            lambda: torch_refine(layer),
        ),
        (
            "refit_scales",
            3 * square,
            lambda: solve.refit_scales(w, h, BITS, layer.codes, layer.scale),
            lambda: torch_refit(layer),
        ),
        (
            f"search_scales, {STEPS} ranges",
            0.0,
            lambda: solve.search_scales(w, diagonal, BITS, size, steps=STEPS),
            lambda: torch_search(layer),
        ),
        ("rounding_loss", square, lambda: solve.rounding_loss(w, h, BITS, size), lambda: torch_rounding_loss(layer)),
        ("prox_linf", 0.0, lambda: solve.prox_linf(w, 1.0), lambda: torch_prox(layer, 1.0)),
        (
            f"accumulate_gram, {SAMPLES} rows",
            SAMPLES * columns * columns,
            lambda: solve.accumulate_gram(layer.x, gram),
            lambda: torch_gram(layer.x, gram),
        ),
        (
            f"accumulate_gram, {SAMPLES} rows of bfloat16",
            SAMPLES * columns * columns,
            lambda: solve.accumulate_gram(rounded, gram),
            lambda: torch_gram(rounded, gram),
        ),
    ]


def seconds(call: Call) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(name: str, operations: float, ours: Call, peer: Call, repeats: int) -> Row:
    """Medians of calls in turn, each solver's with the peak beside it."""
    own, others, shares, ratios = [], [], [], []
    for _ in range(repeats):
        before = _core.measure_peak("f32_fma", 0.02)
        own.append(seconds(ours))
        after = _core.measure_peak("f32_fma", 0.02)
        others.append(seconds(peer))
        ratios.append(others[-1] / own[-1])
        if operations and before and after:
            shares.append(operations / own[-1] / ((before + after) / 2))
    share = statistics.median(shares) if shares else None
    return {
        "solver": name,
        "seconds": statistics.median(own),
        "torch_seconds": statistics.median(others),
        "faster": statistics.median(ratios),
        "operations": operations,
        "peak_share": share,
    }


def run(threads: list[int], quick: bool, only: list[str]) -> dict[str, Any]:
    """Everything, as JSON has it."""
    result: dict[str, Any] = {"benchmark": "solve", "machine": machine(), "quick": quick, "results": []}
    for rows, columns, group_size in QUICK if quick else SHAPES:
        layer = Layer.make(rows, columns, group_size)
        for count in threads:
            _core.set_num_threads(count)
            torch.set_num_threads(count)
            for name, operations, ours, peer in cases(layer):
                if only and not any(part in name for part in only):
                    continue
                row = measure(name, operations, ours, peer, 1 if quick else 5 if rows * columns < 2e6 else 3)
                result["results"].append(
                    {"rows": rows, "columns": columns, "group_size": group_size, "threads": count, **row}
                )
    return result


def table(result: dict[str, Any]) -> str:
    """The results for people."""
    lines = machine_lines(result["machine"])
    for row in result["results"]:
        share = "" if row["peak_share"] is None else f"{row['peak_share']:.2f} of the FMA peak"
        lines.append(
            f"{row['rows']:5} x {row['columns']:<5} {row['threads']} thread(s)  {row['solver']:28} "
            f"{1e3 * row['seconds']:9.2f} ms  {row['faster']:6.1f} x torch  {share}"
        )
    return "\n".join(lines)


def main() -> int:
    """Measures, prints the table, writes the JSON; 1 after an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write all results as JSON to FILE; '-' is standard output")
    parser.add_argument("--isa", help="kernels of this instruction set instead of the best one")
    parser.add_argument("--threads", metavar="N[,N…]", default="1,2", help="thread counts (default: 1,2)")
    parser.add_argument("--quick", action="store_true", help="a small layer: shows that everything runs, not how fast")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="only solvers with TEXT in the name"
    )
    args = parser.parse_args()
    try:
        if args.isa:
            _core.set_cpu_isa(args.isa)
        result = run([int(part) for part in args.threads.split(",")], args.quick, args.only)
    except (Error, ValueError) as error:
        print(f"benchmarks/solve.py: error: {error}", file=sys.stderr)
        return 1
    publish(result, table(result), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
