"""Which score of a layer's importance pays: perplexity of mixed bits by every method at the same bytes.

Importance is measured with ``--seeds`` calibration seeds. Then, on WikiText-2, the model is run with INT8 and INT4 on
shares of its layers (per channel and with groups of 64), and with {8, 4, 3, 2} bits at a few averages: by order of
each score, evenly mixed, at random, and as the planner's knapsack has it. All work lies in ``--work``; a run that was
stopped (``--time-limit``) goes on there. Matrices are rounded once per width by qtale's operators and swapped in a
transformers model that computes in ``--dtype``; bfloat16 is twice as fast where the processor has it.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import qtale
from lsaq_mixes import Cache, Methods, Mix, Model
from lsaq_tables import memory_rows, render, row, strategy_rows
from output import exit_with, publish
from qtale import InputError, MeasureOptions, _core
from qtale.importance import METRICS, Importance
from qtale.planner.source import Source, open_source

GROUP = 64
BUDGETS = (3.5, 4.5, 5.0, 6.0)
MIXES = (7.0, 6.0, 5.0)
PLANNED = ("best", "kl", "fisher", "noise", "jaccard", "none")


def mixes(methods: Methods, sources: list[Source], options: argparse.Namespace) -> list[Mix]:
    """What is to be run, the comparison at {8, 4, 3, 2} bits first; the same assignment is computed only once."""
    found = [methods.same(16, GROUP, "dense")]
    first = sources[0]
    ordered = _ordered(first)
    planned = [metric for metric in PLANNED if metric in (*ordered, "best", "none")]
    for average in options.budgets:
        found += [methods.knapsack(first, metric, average, GROUP) for metric in planned]
        found += _layered(methods, first, average, GROUP, ("fisher", "jaccard"), options.random_seeds)
    found += [methods.same(bits, group) for group in (GROUP, "channel") for bits in (8, 4)] + [methods.same(3, GROUP)]
    for average in (*options.budgets, *(one for one in options.mixes if one not in options.budgets)):
        found += _layered(methods, first, average, GROUP, ordered, options.random_seeds)
    for average in options.mixes:
        found += _layered(methods, first, average, "channel", ordered, options.random_seeds)
    found = [_seeded(mix, 0) for mix in found]
    for seed, source in enumerate(sources[1:], start=1):
        importance = _scores(source)
        for average in options.budgets:
            again = [methods.knapsack(source, metric, average, GROUP) for metric in ("best", "fisher", "jaccard")]
            again += [methods.greedy(importance, metric, average, GROUP) for metric in ("fisher", "jaccard")]
            found += [_seeded(mix, seed) for mix in again]
    return found


def _seeded(mix: Mix, seed: int) -> Mix:
    """Mixes by a score depend on the calibration seed, random ones have theirs, the others none."""
    return replace(mix, seed=seed) if mix.method.startswith(("greedy ", "knapsack ")) else mix


def _layered(
    methods: Methods, source: Source, average: float, group: int | str, metrics: tuple[str, ...], seeds: int
) -> list[Mix]:
    found = [methods.greedy(_scores(source), metric, average, group) for metric in metrics]
    found.append(methods.spread(average, group))
    return found + [methods.random(average, group, seed) for seed in range(seeds)]


def _ordered(source: Source) -> tuple[str, ...]:
    return tuple(metric for metric in _scores(source).scores if metric != "random")


def _scores(source: Source) -> Importance:
    if source.importance is None:
        raise InputError("lsaq: the scores are missing; let the benchmark measure them.")
    return source.importance


def measured(options: argparse.Namespace, folder: Path) -> list[Source]:
    """The model with its scores by every calibration seed; those that lie in the work folder are not measured again."""
    sources = []
    for seed in range(options.seeds):
        path = options.work / f"importance-{seed}.json"
        if not path.exists():
            asked = MeasureOptions(
                metrics=tuple(options.metrics.split(",")),
                num_sequences=options.num_sequences,
                seq_len=options.seq_len,
                loss_sequences=options.num_sequences,
                group_size=GROUP,
                seed=seed,
                top_k=options.top_k,
            )
            qtale.measure(folder, asked, calibration=options.calibration, out=path, resume=path.with_suffix(""))
        sources.append(open_source(path, folder))
    return sources


def windows(folder: Path, options: argparse.Namespace) -> torch.Tensor:
    """The first windows [count, length] of WikiText-2's test text."""
    from transformers import AutoTokenizer

    text = (Path(options.data) / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    count, length = options.windows, options.window_tokens
    tokens = AutoTokenizer.from_pretrained(folder)(text[: count * length * 16], add_special_tokens=False).input_ids
    if len(tokens) < count * length:
        raise InputError(f"lsaq: the text has too few tokens for {count} windows of {length}; ask for fewer.")
    return torch.tensor(tokens[: count * length]).reshape(count, length)


def run(model: Model, cache: Cache, todo: list[Mix], limit: float | None) -> int:
    """Compute what the cache lacks until the time is over; returns how many are left."""
    from tqdm.auto import tqdm

    start = time.monotonic()
    missing = list({mix.key: mix for mix in todo if mix.key not in cache.losses}.values())
    for done, mix in enumerate(tqdm(missing, desc="perplexity", unit="mix", file=sys.stderr)):
        if limit is not None and time.monotonic() - start > limit:
            return len(missing) - done
        cache.put(mix.key, model.loss(mix))
    return 0


def results(options: argparse.Namespace, sources: list[Source], methods: Methods, folder: Path) -> dict[str, Any]:
    """All figures as JSON has them."""
    tokens = windows(folder, options)
    settings = {
        "model": str(options.model),
        "fingerprint": methods.source.model.fingerprint,
        "windows": options.windows,
        "window_tokens": options.window_tokens,
        "dtype": options.dtype,
    }
    cache = Cache(options.work / "losses.json", settings)
    model = Model(methods.source, tokens, getattr(torch, options.dtype))
    todo = mixes(methods, sources, options)
    left = run(model, cache, todo, options.time_limit)
    seeds = {"calibration_seeds": options.seeds, "random_seeds": options.random_seeds}
    calibration = {key: _scores(sources[0]).settings[key] for key in ("num_sequences", "seq_len", "top_k")}
    scores = {metric: _scores(sources[0]).ranking(metric) for metric in _ordered(sources[0])}
    quarter = round(methods.layers / 4)
    return {
        "format": "qtale.results",
        "version": 1,
        "machine": {"cpu": _cpu(), "isa": _core.cpu_isa(), "threads": torch.get_num_threads()},
        "settings": {**settings, **seeds, "calibration": calibration},
        "unfinished": left,
        "rows": [row(methods, mix, cache.losses[mix.key]) for mix in todo if mix.key in cache.losses],
        "first_quarter": {metric: sorted(order[:quarter]) for metric, order in scores.items()},
        "strategy": strategy_rows(sources[0]),
        "memory": memory_rows(methods, model, _scores(sources[0])),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a model folder (default: the demo model)")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with wikitext2/wiki.test.raw")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="scores and finished losses lie here")
    parser.add_argument("--calibration", default="bundled", help="as for qtale measure")
    parser.add_argument("--seeds", type=int, default=1, help="calibration seeds; the first is used for all tables")
    parser.add_argument("--metrics", default=",".join(METRICS), metavar="A,B", help="scores to measure (default: all)")
    parser.add_argument("--random-seeds", type=int, default=5)
    parser.add_argument("--num-sequences", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=500)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window-tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), metavar="BITS")
    parser.add_argument("--mixes", type=float, nargs="+", default=list(MIXES), metavar="BITS")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no more mixes after it")
    parser.add_argument("--quick", action="store_true", help="one short window, one average: shows that it runs")
    parser.add_argument("--json", metavar="FILE|-", help="write all figures")
    options = parser.parse_args()
    if options.quick:
        quick = {"windows": 1, "window_tokens": 128, "budgets": [5.0], "mixes": [5.0], "random_seeds": 2, "seeds": 1}
        vars(options).update({**quick, "num_sequences": 2, "seq_len": 32, "top_k": 20})
    return options


def main() -> int:
    options = parse()
    if min(options.seeds, options.windows, options.random_seeds) < 1 or options.window_tokens < 2:
        raise InputError("lsaq: --seeds, --windows and --random-seeds must be 1 or more, --window-tokens 2 or more.")
    options.work.mkdir(parents=True, exist_ok=True)
    folder = qtale.demo.model() if options.model == "demo" else Path(options.model)
    sources = measured(options, folder)
    found = results(options, sources, Methods(sources[0], options.work), folder)
    publish(found, render(found), options.json)
    return 0


if __name__ == "__main__":
    exit_with(main)
