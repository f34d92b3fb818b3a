"""How much the ranking of layers depends on the calibration sequences, by the size k of LSAQ's token sets.

For every seed other windows of the text are drawn and the model is measured once; the k best of smaller k are a part of
those of the largest. Printed is the mean Kendall tau-b between the rankings of two seeds, over all pairs of seeds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import qtale
from output import exit_with, publish
from qtale import InputError, MeasureOptions
from qtale.importance import Importance

SIZES = (10, 20, 50, 100, 200, 500, 1000)
OTHERS = ("lim", "bi")


@dataclass(frozen=True)
class Row:
    """``tau`` and ``worst`` are mean and least over pairs of seeds; ``tied`` is the share of pairs of layers that are
    equal within a seed; ``to_largest`` is the mean tau to the ranking by the largest k of the same seed."""

    metric: str
    k: int | None
    tau: float
    worst: float
    tied: float
    to_largest: float | None


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b of two lists of scores [layers]."""
    signs = [np.sign(np.subtract.outer(scores, scores)) for scores in (a, b)]
    return float((signs[0] * signs[1]).sum() / np.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum()))


def jaccard(importance: Importance, k: int) -> np.ndarray:
    """LSAQ's importance [layers] with the ``k`` best tokens, from the ordered token sets of a larger k."""
    scores = []
    for sets in importance.token_sets:
        pairs = itertools.pairwise([set(tokens[:k]) for tokens in sets])
        scores.append([1 - len(a & b) / len(a | b) for a, b in pairs])
    return np.mean(scores, 0)


def row(metric: str, k: int | None, scores: list[np.ndarray], largest: list[np.ndarray] | None) -> Row:
    taus = [kendall(a, b) for a, b in itertools.combinations(scores, 2)]
    layers = len(scores[0])
    equal = [(np.subtract.outer(one, one) == 0).sum() - layers for one in scores]
    agreement = (
        None if largest is None else float(np.mean([kendall(*pair) for pair in zip(scores, largest, strict=True)]))
    )
    tied = float(np.mean(equal)) / (layers * (layers - 1))
    return Row(metric, k, float(np.mean(taus)), min(taus), tied, agreement)


def measure(arguments: argparse.Namespace, seed: int) -> Importance:
    options = MeasureOptions(
        metrics=("jaccard", *OTHERS),
        num_sequences=arguments.num_sequences,
        seq_len=arguments.seq_len,
        seed=seed,
        top_k=max(arguments.sizes),
        matrix=arguments.matrix,
        norm=arguments.norm,
    )
    return qtale.measure(arguments.model, options, calibration=arguments.calibration, progress=sys.stderr.isatty())


def rows_of(found: list[Importance], sizes: list[int]) -> list[Row]:
    by_size = {k: [jaccard(importance, k) for importance in found] for k in sizes}
    largest = by_size[max(sizes)]
    rows = [row("jaccard", k, scores, largest) for k, scores in by_size.items()]
    return rows + [row(name, None, [np.array(one.scores[name]) for one in found], None) for name in OTHERS]


def table(rows: list[Row]) -> str:
    lines = [f"{'metric':8} {'k':>5} {'tau':>6} {'worst':>6} {'tied':>6} {'tau to largest k':>17}"]
    for one in rows:
        last = "" if one.to_largest is None else f"{one.to_largest:.3f}"
        lines.append(f"{one.metric:8} {one.k or '':>5} {one.tau:6.3f} {one.worst:6.3f} {one.tied:6.3f} {last:>17}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a model folder or hub name (default: the demo model)")
    parser.add_argument("--calibration", default="bundled", help="as for qtale measure")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--num-sequences", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="K")
    parser.add_argument("--matrix", default="embed")
    parser.add_argument("--norm", default="none")
    parser.add_argument("--json", metavar="FILE|-", help="write all figures")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.seeds < 2:
        raise InputError(f"--seeds {arguments.seeds}: rankings of two seeds at least are compared.")
    if arguments.model == "demo":
        arguments.model = qtale.demo.model()
    rows = rows_of([measure(arguments, seed) for seed in range(arguments.seeds)], arguments.sizes)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    result: dict[str, Any] = {"settings": settings, "rows": [asdict(one) for one in rows]}
    publish(result, table(rows), arguments.json)
    return 0


if __name__ == "__main__":
    exit_with(main)
