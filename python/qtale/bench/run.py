"""One model's speed by threads and batch, beside the machine's limits and, if asked for, beside llama.cpp."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from qtale import _core
from qtale.bench.figures import Row, batches, decode, make_row, prefill
from qtale.bench.gguf_shape import write_shape
from qtale.bench.llama_bench import LlamaBench, find_llama_bench
from qtale.bench.machine import machine
from qtale.bench.samples import Timed
from qtale.bench.subject import CONTEXT, Decoding, Subject
from qtale.checkpoint.folder import open_folder
from qtale.engine.layout import WeightOptions
from qtale.engine.model import LoadedModel, LoadOptions
from qtale.engine.overrides import check_overrides
from qtale.errors import InputError
from qtale.routing import RoutingOverrides

PEERS = ("llama.cpp",)
_PEER_TOKENS = 64
_PEAKS = ("int8_dot", "int8_tile", "f32_fma")
_MEMORY = 256 << 20


class Peer(Protocol):
    """Another engine with one model; rates are tokens per second."""

    @property
    def name(self) -> str: ...

    @property
    def bytes_per_token(self) -> int: ...

    def prefill(self, tokens: int, threads: int, repeats: int = 1) -> float: ...

    def decode(self, tokens: int, threads: int, repeats: int = 1) -> float: ...


@dataclass(frozen=True)
class BenchOptions:
    """What is measured: thread counts, batches of decoding, tokens of the prompt, samples; ``peer`` is in ``PEERS``.

    ``peer_path`` is a llama-bench program; ``routing`` says which layers tokens skip. Raises InputError for values that
    are not accepted.
    """

    threads: tuple[int, ...] = (1,)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    prompt: int = 512
    repeats: int = 9
    peer: str | None = None
    peer_path: Path | None = None
    weights: WeightOptions = field(default_factory=WeightOptions)
    load: LoadOptions = field(default_factory=LoadOptions)
    cache: str | None = None
    routing: RoutingOverrides = field(default_factory=RoutingOverrides)

    def __post_init__(self) -> None:
        for name, values in (("threads", self.threads), ("batch", self.batches)):
            if not values or any(value < 1 for value in values):
                raise InputError(f"bench: {name} {list(values)} must be counts from 1, such as 1,2.")
        if min(self.prompt, self.repeats) < 1:
            raise InputError(f"bench: prompt {self.prompt} and repeat {self.repeats} must be 1 or more.")
        if self.peer is not None and self.peer not in PEERS:
            raise InputError(f"bench: peer {self.peer!r} is not known; use {', '.join(PEERS)}.")


def bench(model: str | Path, options: BenchOptions, progress: bool = True) -> dict[str, Any]:
    """Load a model and measure it; returns machine, limits and rows (see :mod:`qtale.bench.figures`) as plain data.

    Raises what :func:`qtale.load` raises, and InputError where the context is too short or the peer is not there.
    """
    binary = find_llama_bench(options.peer_path) if options.peer else None
    before = _core.num_threads()
    try:
        folder = open_folder(model)
        check_overrides(options.routing, folder.path)
        _core.set_num_threads(max(options.threads))
        loaded = LoadedModel(folder, options.weights, options.load, options.cache, progress)
        subject = Subject(loaded, options.routing)
        subject.check_room(max(options.prompt, CONTEXT))
        limits = [_limits(threads) for threads in options.threads]
        with tempfile.TemporaryDirectory() as work:
            peer = None if binary is None else _peer(subject, binary, Path(work))
            steps = len(options.threads) * (3 + (0 if peer is None else 2))
            found = _rows(subject, options, peer)
            parts = list(tqdm(found, desc="bench", total=steps, leave=False, delay=1, disable=not progress))
    finally:
        _core.set_num_threads(before)
    work_of = subject.work
    return {
        "model": str(folder.path),
        "machine": machine(),
        "routing": asdict(options.routing),
        "kv_dtype": loaded.kv_dtype,
        "kv_rule": options.load.kv_rule or loaded.routing.kv_rule,
        "weights": {"token_bytes": work_of.token_bytes, "head_bytes": work_of.head_bytes},
        "limits": limits,
        "results": [row for part in parts for row in part],
    }


def _limits(threads: int) -> dict[str, Any]:
    _core.set_num_threads(threads)
    read, reader, copy = _core.measure_memory(_MEMORY, 3)
    peaks = {name: _core.measure_peak(name, 0.05) for name in _PEAKS}
    return {"threads": threads, "dram_read": read, "reader": reader, "copy": copy, **peaks}


def _rows(subject: Subject, options: BenchOptions, peer: Peer | None) -> Iterator[list[Row]]:
    for threads in options.threads:
        _core.set_num_threads(threads)
        yield [decode(subject, options.repeats)]
        yield batches(subject, sorted(set(options.batches)), max(1, options.repeats // 3))
        yield [prefill(subject, options.prompt, max(1, options.repeats // 3))]
        if peer is not None:
            yield beside(subject, peer, options.prompt, max(1, options.repeats // 3))


def beside(subject: Subject, peer: Peer, prompt: int, repeats: int) -> list[Row]:
    """Decode and prefill over a peer's, taken in turn, on the threads in use."""
    threads = _core.num_threads()
    with Decoding(subject, longest=_PEER_TOKENS) as decoding:
        steps = decoding.longest

        def decoded() -> float:
            return steps / decoding.seconds(steps)

        def read() -> float:
            return prompt / subject.prefill_seconds(prompt)

        ways: dict[str, tuple[Timed, Timed]] = {
            "decode": (decoded, partial(peer.decode, steps, threads)),
            "prefill": (read, partial(peer.prefill, prompt, threads)),
        }
        rows = []
        for what, (ours, theirs) in ways.items():
            pairs = [(ours(), theirs()) for _ in range(repeats)]
            rate, limit = (statistics.median(side) for side in zip(*pairs, strict=True))
            row = make_row(f"{what} over {peer.name}", rate, "tokens/s", samples=repeats, limit=limit)
            row |= {"share": statistics.median(a / b for a, b in pairs), "limit_name": f"{limit:.1f} tokens/s"}
            rows.append(row)
    return rows


def _peer(subject: Subject, binary: Path, work: Path) -> LlamaBench:
    """The peer with a file of the model's shape, in the type whose bits are nearest from above."""
    bits = max(
        (source.spec.num_bits if source.spec else 16)
        for name, block in subject.model.layout.blocks.items()
        if name.startswith("layers.")
        for source in block.sources
    )
    kind = "Q4_0" if bits <= 4 else "Q8_0" if bits <= 8 else "F16"
    return LlamaBench(f"llama.cpp {kind}", binary, write_shape(work / f"{kind}.gguf", subject.spec, kind))
