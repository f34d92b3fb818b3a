"""Minutes of mixed calls on one engine: memory stays flat and every call gives the bits that it gave first.

Generation (greedy, sampled, batched, streamed and left early), conversations, logits, log-likelihoods, perplexity and
static depths take turns in random order; sometimes two threads call at a time. With ``--routed`` random routers let
tokens skip layers in all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import qtale
from output import publish
from qtale import process
from qtale.bench import machine
from qtale.engine import Engine
from qtale.errors import Error
from random_models import routed_copy

TEXT = (
    "The lake lies between two hills, and in the morning its water is warmer than the air above it. Farmers on the "
    "northern shore grow apples, because the slope keeps the frost away. In winter the ferry stops, and people walk "
    "across the ice to the market on the other side, where they sell bread, wool and tools made of iron. "
)
PROMPTS = ["The capital of France is", TEXT, "Once upon a time", TEXT + TEXT]
ENDINGS = [" in the morning", " Paris", " apples", " iron and wool"]
SLACK = 4 << 20  # bytes that memory may grow by
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
THREADED = 0.2  # share of turns with two threads


def give_back_at_once() -> None:
    """Tell glibc to keep no large freed blocks: what it keeps (tens of MiB, by chance) would hide what leaks."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD) if mallopt is not None else ():
        mallopt(parameter, 128 << 10)


def rss(released: bool = False) -> int:
    """Resident bytes of this process; ``released``: after what is free was given back to the system."""
    if released:
        gc.collect()
        process.release()
    return process.resident_bytes() or 0


class Calls:
    """What is called, by name; each gives the same value every time."""

    def __init__(self, engine: Engine, tokens: int) -> None:
        self.engine, self.tokens = engine, tokens
        self.prompts = [engine.tokenizer.encode(prompt)[: engine.context // 2] for prompt in PROMPTS]

    def greedy(self) -> Any:
        return self.engine.generate(self.prompts[0], self.tokens)

    def batch(self) -> Any:
        return self.engine.generate(self.prompts, self.tokens, ignore_end=True)

    def sampled(self) -> Any:
        return self.engine.generate(self.prompts[2], self.tokens, temperature=0.9, top_p=0.9, seed=7)

    def left_early(self) -> Any:
        stream = self.engine.generate(self.prompts[1], self.tokens, stream=True, ignore_end=True)
        return [piece.tokens for piece in islice(stream, 5)]

    def conversation(self) -> Any:
        with self.engine.session() as session:
            first = list(session.stream(self.prompts[0], 6))
            return [*first, *session.stream([*self.prompts[0], *self.prompts[2]], 6)], session.reused

    def logits(self) -> Any:
        return self.engine.logits(self.prompts[1]).tobytes()

    def loglikelihood(self) -> Any:
        encode = self.engine.tokenizer.encode
        endings = [encode(ending) for ending in ENDINGS]
        return self.engine.loglikelihood([(prompt, ending) for prompt in self.prompts for ending in endings])

    def perplexity(self) -> Any:
        return self.engine.perplexity(TEXT * 4, window=min(64, self.engine.context))

    def depth(self) -> Any:
        """Every second layer, alone: other threads would run at this depth too."""
        try:
            self.engine.set_depth(range(0, self.engine.spec.num_layers, 2))
            return self.greedy()
        finally:
            self.engine.set_depth(None)

    def theta(self) -> Any:
        """A higher threshold, alone; every token's decisions."""
        before = self.engine.theta
        self.engine.theta, self.engine.record_decisions = 0.7, True
        try:
            found, decisions = self.batch(), self.engine.report.decisions
            return found, None if decisions is None else decisions.tobytes()
        finally:
            self.engine.theta, self.engine.record_decisions = before, False

    def alone(self) -> dict[str, Callable[[], Any]]:
        """Those that change the engine while they run."""
        return {"depth": self.depth, "theta": self.theta}

    def shared(self) -> dict[str, Callable[[], Any]]:
        """Those that threads may call at a time."""
        found = (self.greedy, self.batch, self.sampled, self.left_early, self.conversation, self.logits)
        return {call.__name__: call for call in (*found, self.loglikelihood, self.perplexity)}


@dataclass
class Soak:
    """One run: what calls gave first, how often they ran, what changed, and memory over time."""

    calls: Calls
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    expected: dict[str, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    changed: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    def check(self, name: str, value: Any) -> None:
        """Note a call; its first value is what later ones are compared with."""
        self.counts[name] += 1
        if self.expected.setdefault(name, value) != value:
            self.changed.append(name)

    def turn(self) -> None:
        """One call, or two in threads of their own."""
        shared = self.calls.shared()
        if self.draw.random() < THREADED:
            names = self.draw.choices(sorted(shared), k=2)
            with ThreadPoolExecutor(2) as pool:
                found = list(pool.map(lambda name: shared[name](), names))
            for name, value in zip(names, found, strict=True):
                self.check(name, value)
            self.counts["in two threads"] += 1
            return
        every = shared | self.calls.alone()
        name = self.draw.choice(sorted(every))
        self.check(name, every[name]())

    def run(self, seconds: float) -> None:
        """All calls once and some turns, which memory is compared with; then turns until the time is over."""
        for name, call in (self.calls.shared() | self.calls.alone()).items():
            self.check(name, call())
        for _ in range(20):
            self.turn()
        self.memory.append((0.0, rss(released=True)))
        start = last = time.monotonic()
        with tqdm(total=round(seconds), unit="s", file=sys.stderr) as bar:
            while (now := time.monotonic()) < start + seconds:
                self.turn()
                if now - last >= max(1.0, seconds / 60):
                    self.memory.append((now - start, rss()))
                    bar.update(round(now - start) - bar.n)
                    last = now
        self.memory.append((time.monotonic() - start, rss(released=True)))

    def result(self) -> dict[str, Any]:
        """The figures, as JSON holds them."""
        sizes = [size for _, size in self.memory]
        held = sum(self.calls.engine._passes.decoder.kv_bytes())
        return {
            "calls": dict(sorted(self.counts.items())),
            "changed": sorted(set(self.changed)),
            "seconds": self.memory[-1][0],
            "rss_start": sizes[0],
            "rss_end": sizes[-1],
            "rss_most": max(sizes),
            "rss": self.memory,
            "kv_bytes_held": held,
            "ok": not self.changed and not held and sizes[-1] - sizes[0] <= SLACK,
        }


def render(result: dict[str, Any]) -> str:
    """The run in a few lines."""
    calls = ", ".join(f"{name} {count}" for name, count in result["calls"].items())
    sizes = " / ".join(f"{result[key] / 2**20:.1f}" for key in ("rss_start", "rss_end", "rss_most"))
    return "\n".join(
        [
            f"{result['seconds']:.0f} s on {result['machine']['cpu']}: {calls}",
            f"resident MiB at start / end / most: {sizes}",
            f"results changed: {', '.join(result['changed']) or 'none'}",
            "ok" if result["ok"] else "NOT OK",
        ]
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a folder, or demo")
    parser.add_argument("--bits", type=int, default=4, help="of a dense model (default 4; 0: as it is)")
    parser.add_argument("--routed", action="store_true", help="random routers on every layer")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--tokens", type=int, default=24, help="to generate, at most")
    parser.add_argument("--threads", type=int, help="of the engine")
    parser.add_argument("--json", metavar="FILE|-", help="write all figures")
    return parser.parse_args()


def load(options: argparse.Namespace, work: Path) -> Engine:
    """The model that the command line names; its routed form lies in ``work``."""
    model = Path(qtale.demo.model() if options.model == "demo" else options.model)
    if options.routed:
        config = json.loads((model / "config.json").read_text())
        model = routed_copy(work / "routed", model, config["num_hidden_layers"], config["hidden_size"], 16)
    return qtale.load(model, bits=options.bits or None, num_threads=options.threads, progress=False)


def main() -> int:
    """Runs and prints what was found; 1 where a result changed or memory grew."""
    options = parse()
    give_back_at_once()
    try:
        with tempfile.TemporaryDirectory() as work:
            soak = Soak(Calls(load(options, Path(work)), options.tokens))
            soak.run(60 * options.minutes)
    except Error as error:
        print(f"soak: error: {error}", file=sys.stderr)
        return 1
    result = {"benchmark": "soak", "machine": machine(), "model": str(options.model), "routed": options.routed}
    result |= soak.result()
    publish(result, render(result), options.json)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
