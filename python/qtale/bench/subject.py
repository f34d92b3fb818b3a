"""A loaded model as something to be timed: passes over random tokens, and the bytes and operations they need."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qtale import _core
from qtale.engine.arena import memory_of
from qtale.engine.model import LoadedModel
from qtale.engine.passes import CallReport, Passes, Segment
from qtale.engine.regions import Block
from qtale.errors import InputError
from qtale.memory.runtime import PASS_TOKENS
from qtale.routing import RoutingOverrides, depth_mask

if TYPE_CHECKING:
    from qtale.tensors import Memory

_PARTS = ("qkv", "o", "gate_up", "down")
# Tokens that a sequence holds when the timing of decoding begins.
CONTEXT = 64
_SEED = 0


@dataclass(frozen=True)
class Work:
    """What a token needs: bytes read and weights multiplied with, by layer (0 outside of a depth) and by the head.

    What routers skip is counted as read. Norms, the embedding's row, and keys and values are not counted.
    """

    layer_bytes: tuple[int, ...]
    layer_weights: tuple[int, ...]
    head_bytes: int
    head_weights: int
    router_bytes: int

    @property
    def token_bytes(self) -> int:
        """Bytes of all matrices and of the head."""
        return sum(self.layer_bytes) + self.head_bytes

    def pass_operations(self, tokens: int) -> float:
        """Two operations for each weight of the layers and token; the head runs once in a pass and is not counted."""
        return 2.0 * tokens * sum(self.layer_weights)


class Subject:
    """Times passes of a model; tokens are random, nothing is sampled, the threads are those of the process."""

    def __init__(self, model: LoadedModel, routing: RoutingOverrides | None = None) -> None:
        self.model = model
        self.spec = model.spec
        self.passes = Passes(model.make_decoder(), model.spec.vocab_size, model.context, model.spec.rope.dynamic_length)
        self._tokens = np.random.default_rng(_SEED).integers(0, self.spec.vocab_size, model.context, dtype=np.int32)
        self._next = 0
        self._layers = [self._blocks(f"layers.{i}.{part}") for i in range(self.spec.num_layers) for part in _PARTS]
        self._head = self._blocks("head")
        self._runs = self._override(routing or RoutingOverrides()) or [True] * self.spec.num_layers
        self.work = self._work()

    def _blocks(self, projection: str) -> list[Block]:
        layout = self.model.layout
        return [layout.blocks[name] for name, _ in layout.projections[projection]]

    def _override(self, routing: RoutingOverrides) -> list[bool] | None:
        """Skip layers as it says; returns which of them run where that is said."""
        routing.check(self.model.routing.routers, "the model")
        if routing.theta is not None:
            self.passes.set_theta(routing.theta)
        runs = depth_mask(routing.layers, self.spec.num_layers)
        self.passes.set_depth(runs)
        return runs

    def _work(self) -> Work:
        per_layer = [
            (runs, [block for part in self._layers[at : at + len(_PARTS)] for block in part])
            for runs, at in zip(self._runs, range(0, len(self._layers), len(_PARTS)), strict=True)
        ]
        return Work(
            tuple(runs * sum(block.nbytes for block in blocks) for runs, blocks in per_layer),
            tuple(runs * sum(block.rows * block.cols for block in blocks) for runs, blocks in per_layer),
            sum(block.nbytes for block in self._head),
            sum(block.rows * block.cols for block in self._head),
            self.passes.decoder.router_bytes(),
        )

    @property
    def weights(self) -> Memory:
        """The memory that each decoded token reads: it lies in one piece."""
        blocks = [block for part in (*self._layers, self._head) for block in part]
        start, end = min(block.offset for block in blocks), max(block.offset + block.nbytes for block in blocks)
        return memory_of(self.model.arena.view(start, end - start), "uint8")

    def read_rate(self, reader: int) -> float:
        """Bytes per second of reading the same memory once by a reader of the library."""
        weights = self.weights
        return weights[2][0] / float(_core.read_seconds([weights], reader))

    def _take(self, count: int) -> list[int]:
        found = np.take(self._tokens, range(self._next, self._next + count), mode="wrap")
        self._next = (self._next + count) % len(self._tokens)
        return [int(token) for token in found]

    def check_room(self, tokens: int) -> None:
        """Raise InputError where a sequence cannot hold so many tokens."""
        if tokens > self.model.context:
            raise InputError(f"bench: {tokens} tokens are beyond the context of {self.model.context}; use fewer.")

    def feed(self, sequence: int, tokens: Sequence[int], report: CallReport) -> None:
        """Run tokens through a sequence in passes of the engine's size, with the logits of the last one only."""
        for start in range(0, len(tokens), PASS_TOKENS):
            piece = tokens[start : start + PASS_TOKENS]
            last = [len(piece) - 1] if start + len(piece) == len(tokens) else []
            self.passes.forward([Segment(sequence, -1, len(piece), len(tokens))], piece, last, report)

    def prefill_seconds(self, tokens: int, report: CallReport | None = None) -> float:
        """Seconds to read a prompt of so many tokens, up to the logits after its last one."""
        self.check_room(tokens)
        ids = self._take(tokens)
        with self.passes.sequences(1) as (sequence,):
            start = time.perf_counter()
            self.feed(sequence, ids, report or CallReport())
            return time.perf_counter() - start


class Decoding:
    """Sequences that hold ``CONTEXT`` tokens, to go on by up to ``longest``; both less in a short context."""

    def __init__(self, subject: Subject, batch: int = 1, longest: int = 64) -> None:
        self._subject, self._batch = subject, batch
        subject.check_room(2)
        self.longest = min(longest, subject.model.context // 2)
        self.context = min(CONTEXT, subject.model.context - self.longest)
        self._sequences = [subject.passes.add() for _ in range(batch)]
        for sequence in self._sequences:
            subject.feed(sequence, subject._take(self.context), CallReport())

    def seconds(self, steps: int, report: CallReport | None = None) -> float:
        """Seconds of ``steps`` passes that give every sequence one token each; forgotten afterwards."""
        subject, report = self._subject, report or CallReport()
        ids = [subject._take(self._batch) for _ in range(steps)]
        segments = [Segment(sequence, -1, 1) for sequence in self._sequences]
        keep = range(self._batch)
        start = time.perf_counter()
        for tokens in ids:
            subject.passes.forward(segments, tokens, keep, report)
        elapsed = time.perf_counter() - start
        for sequence in self._sequences:
            subject.passes.truncate(sequence, self.context)
        return elapsed

    def close(self) -> None:
        """Forget the sequences."""
        for sequence in self._sequences:
            self._subject.passes.remove(sequence)
        self._sequences = []

    def __enter__(self) -> Decoding:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
