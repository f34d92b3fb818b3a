"""The engine as a share of what the machine can do at that moment, and beside other engines; see README.md."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import engine_cases as cases
from engine_cases import QUICK, Sizes
from output import publish
from peers import Choice, add_peer_arguments, choice_of, peers
from qtale import _core, demo
from qtale.bench import Row, Subject, batches, decode, machine, machine_lines, prefill, table
from qtale.bench.figures import judge
from qtale.bench.run import beside
from qtale.engine.layout import WeightOptions
from qtale.errors import Error
from qtale.spec import QuantSpec
from random_models import TINY, TINYLLAMA, Shape, routed_copy, write_model

ROUTER_WIDTH = 128
NEVER_FALLS = 0.98
SHAPES: dict[str, Shape] = {"1.1b": TINYLLAMA, "tiny": TINY}


@dataclass(frozen=True)
class Format:
    """Weights of the layers and of the head, and the shares to reach with avx512 and avx2."""

    name: str
    spec: QuantSpec
    head_bits: int
    decode: tuple[float, float] | None = None
    prefill: tuple[float, float] | None = None
    every: bool = False  # all other figures too
    peer: str | None = None  # file type that stands beside it
    compute: str = "int8"


FORMATS = (
    Format("W4", QuantSpec(4, "auto"), 4, (0.85, 0.78), (0.60, 0.95), True),
    Format("W4 head 8", QuantSpec(4, "auto"), 8, (0.85, 0.78), None, False, "4"),
    Format("W8", QuantSpec(8, "channel"), 8, (0.90, 0.82), (0.60, 0.62), False, "8"),
    Format("W3", QuantSpec(3, "auto"), 4, (0.85, 0.65)),
    Format("W4 int16", QuantSpec(4, "auto"), 4, compute="int16"),
)
# Over llama.cpp and ik_llama.cpp, avx512 and avx2: decode (of 4 bits only), prefill.
PEER_TARGETS = {
    "llama.cpp": {"decode": (1.5, 1.6), "prefill": (2.5, 1.8)},
    "ik_llama.cpp": {"decode": (1.3, 1.6), "prefill": (1.6, 1.8)},
}
ROUTED = ("static", "routed", "KV")
BATCH_GAIN = (4.0, 3.0)


def of_isa(targets: tuple[float, float] | None) -> float | None:
    """The target for the instruction set in use."""
    isa = _core.cpu_isa().split("_")[0]
    return targets[isa == "avx2"] if targets and isa in ("avx512", "avx2") else None


class Bench:
    """One run: what is wanted, how much, and where its files lie."""

    def __init__(self, threads: Sequence[int], sizes: Sizes, only: Sequence[str], choice: Choice | None, work: Path):
        self.threads, self.sizes, self.only, self.choice, self.work = threads, sizes, only, choice, work

    def wants(self, name: str) -> bool:
        """Whether a figure was asked for."""
        return not self.only or any(text in name for text in self.only)

    def wants_of(self, *names: str) -> bool:
        """Whether a figure whose name begins with one of these may have been asked for."""
        return not self.only or any(text in name or name in text for text in self.only for name in names)

    def on_threads(self, name: str, measure: Callable[[], Row | list[Row]]) -> Iterator[Row]:
        """Rows of ``measure`` for each number of threads, if its name is wanted."""
        for threads in self.threads if self.wants(name) else ():
            _core.set_num_threads(threads)
            found = measure()
            yield from found if isinstance(found, list) else [found]

    def basic(self, subject: Subject, form: Format) -> Iterator[Row]:
        """Decoding and prefill beside the limits."""
        sizes = self.sizes
        targets = of_isa(form.decode), of_isa(form.prefill)
        yield from self.on_threads(f"{form.name} decode", lambda: judge(decode(subject, sizes.repeats), targets[0]))
        if form.prefill or form.compute != "int8":
            yield from self.on_threads(
                f"{form.name} prefill",
                lambda: judge(prefill(subject, sizes.short, sizes.slow_repeats), targets[1]),
            )

    def more(self, subject: Subject, form: Format) -> Iterator[Row]:
        """Long prompts, two threads, batches."""
        sizes, name = self.sizes, form.name
        yield from self.on_threads(f"{name} long", lambda: cases.long_prompt(subject, sizes))
        if max(self.threads) >= 2:
            if self.wants(f"{name} threads decode"):
                yield cases.two_threads_decode(subject, sizes)
            if self.wants(f"{name} threads prefill"):
                yield cases.two_threads_prefill(subject, sizes)
        yield from self.on_threads(f"{name} batch", lambda: judged_batches(subject, sizes))

    def routed(self, subject: Subject, form: Format) -> Iterator[Row]:
        """Routed execution and its memory."""
        sizes = self.sizes
        for ratio in sizes.ratios:
            yield from self.on_threads(
                f"{form.name} static", lambda r=ratio: cases.routed_decode(subject, r, None, sizes)
            )
            if not self.wants_of(f"{form.name} routed", f"{form.name} KV"):
                continue
            _core.set_num_threads(max(self.threads))
            theta = cases.find_theta(subject, ratio, min(64, sizes.short))
            yield from self.on_threads(
                f"{form.name} routed decode", lambda r=ratio, t=theta: cases.routed_decode(subject, r, t, sizes)
            )
            yield from self.on_threads(
                f"{form.name} routed prefill", lambda r=ratio, t=theta: cases.routed_prefill(subject, r, t, sizes)
            )
            yield from self.routed_batches(subject, form, ratio, theta)
            if self.wants(f"{form.name} KV"):
                yield cases.kv_memory(subject, ratio, theta, 2 * sizes.short)
        # Every token executes every layer and every router runs: the least that routing can gain.
        yield from self.routed_batches(subject, form, 1.0, 0.0)

    def routed_batches(self, subject: Subject, form: Format, ratio: float, theta: float) -> Iterator[Row]:
        """Decoding of batches by routers, which is never to be slower than dense."""
        for size in self.sizes.routed_batches:
            yield from self.on_threads(
                f"{form.name} routed batch",
                lambda n=size, r=ratio, t=theta: cases.routed_batch(subject, n, r, t, self.sizes),
            )

    def beside(self, subject: Subject, form: Format, model: str) -> Iterator[Row]:
        """Rates over those of peers, taken in turn."""
        if self.choice is None or form.peer is None or not self.wants(f"{form.name} peer"):
            return
        kinds = tuple(kind for kind in self.choice.kinds if form.peer in kind)
        choice = Choice(self.choice.cache, self.choice.source, self.choice.ik, kinds, self.choice.packages)
        for peer in peers(model, choice, self.work):
            if form.peer not in peer.name:
                continue
            for threads in self.threads:
                _core.set_num_threads(threads)
                yield from over_peer(subject, peer, form, self.sizes)


def judged_batches(subject: Subject, sizes: Sizes) -> list[Row]:
    """Tokens per second never fall with the batch; the last row tells the gain too."""
    rows = [judge(row, NEVER_FALLS) for row in batches(subject, sizes.batches, max(2, sizes.repeats // 3))]
    last = dict(rows[-1])
    last |= {"figure": f"batch {sizes.batches[-1]} : 1", "share": last["gain"], "limit_name": "batch 1"}
    return [*rows, judge(last, of_isa(BATCH_GAIN))]


def over_peer(subject: Subject, peer: Any, form: Format, sizes: Sizes) -> Iterator[Row]:
    """Decode and prefill over one peer's, judged for 4 bits, and for others in prefill."""
    engine = peer.name.split()[0]
    for row in beside(subject, peer, sizes.short, max(1, sizes.slow_repeats // 2)):
        what = row["figure"].split()[0]
        target = of_isa(PEER_TARGETS.get(engine, {}).get(what))
        yield judge(row, target if form.peer == "4" or what == "prefill" else None)


def model_folder(model: str, form: Format, work: Path) -> tuple[Path, WeightOptions]:
    """A model in a format: random folders are made so, others are rounded while they are read."""
    if model in SHAPES:
        path = work / f"{model}-{form.spec.num_bits}"
        return path if path.exists() else write_model(path, SHAPES[model], form.spec), WeightOptions(
            None, form.head_bits
        )
    return Path(demo.model() if model == "demo" else model), WeightOptions(form.spec, form.head_bits)


def figures(bench: Bench, model: str, form: Format) -> Iterator[Row]:
    """All rows of one model in one format."""
    parts = ("decode", "prefill", "long", "threads", "batch", *ROUTED, "load", "peer")
    if not bench.wants_of(*(f"{form.name} {part}" for part in parts)):
        return
    folder, options = model_folder(model, form, bench.work)
    subject = Subject(cases.loader(folder, options, form.compute)(None))
    yield from bench.basic(subject, form)
    yield from bench.beside(subject, form, model)
    if not form.every:
        return
    yield from bench.more(subject, form)
    spec = subject.spec
    del subject
    if bench.wants_of(*(f"{form.name} {part}" for part in ROUTED)):
        copy = routed_copy(bench.work / f"{model}-routed", folder, spec.num_layers, spec.hidden_size, ROUTER_WIDTH)
        yield from bench.routed(Subject(cases.loader(copy, options)(None)), form)
    if bench.wants(f"{form.name} load"):
        _core.set_num_threads(max(bench.threads))
        yield from cases.loading(cases.loader(folder, options), bench.work / f"{model}-cache", bench.sizes)


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All results as one JSON object."""
    threads = sorted({int(part) for part in args.threads.split(",")})
    sizes = QUICK if args.quick else Sizes()
    if args.repeat:
        sizes = Sizes(args.repeat, max(1, args.repeat // 3), sizes.short, sizes.long, sizes.batches, sizes.ratios)
    bench = Bench(threads, sizes, args.only, choice_of(args) if args.peers else None, work)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    rows: list[Row] = []
    result = {"benchmark": "engine", "time": stamp, "machine": machine(), "quick": args.quick, "results": rows}
    for model in tqdm(args.model or ["1.1b", "demo"], desc="models", file=sys.stderr):
        for form in tqdm(FORMATS, desc=model, file=sys.stderr, leave=False):
            for row in figures(bench, model, form):
                row = judge(row, None) if args.quick else row
                rows.append({"model": f"{model} {form.name}", **row})
                tqdm.write(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    return result


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", action="append", metavar="M", help="1.1b (random weights), demo, tiny, or a folder; repeatable"
    )
    parser.add_argument("--threads", default="1,2", metavar="N[,N…]")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: shows that it runs, says nothing about speed"
    )
    parser.add_argument(
        "--repeat", type=int, metavar="N", help="samples (default 15; a third of it where they are slow)"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="figures with TEXT, as 'W4 decode', 'routed', 'batch'",
    )
    parser.add_argument("--json", metavar="FILE", help="write all results as JSON to FILE; '-' is standard output")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the random models in DIR for the next run")
    parser.add_argument("--peers", action="store_true", help="other engines in turn with ours; see peers.py")
    add_peer_arguments(parser)
    return parser.parse_args()


def main() -> int:
    """Measures, prints the table, writes the JSON; 1 after an error."""
    args = parse_arguments()
    try:
        with tempfile.TemporaryDirectory() as work:
            result = run(args, args.work or Path(work))
    except (Error, ValueError) as error:
        print(f"benchmarks/engine.py: error: {error}", file=sys.stderr)
        return 1
    text = "\n".join([*machine_lines(result["machine"]), "", table(result["results"])])
    publish(result, text, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
