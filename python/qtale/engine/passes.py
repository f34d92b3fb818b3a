"""Calls of the core's Decoder with numpy memory, one at a time, and the sequences that they run on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from qtale.engine.arena import memory_of
from qtale.errors import InputError

if TYPE_CHECKING:
    from qtale import _core

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


class Segment(NamedTuple):
    """``tokens`` new ones of a sequence, which takes over what ``parent`` holds first (-1: none).

    ``text_length`` counts the tokens of the whole text that they are a part of, by which dynamic rotary positions go;
    0 where it ends here.
    """

    sequence: int
    parent: int
    tokens: int
    text_length: int = 0


@dataclass
class CallReport:
    """What one call of an engine ran: ``tokens`` entered, of which each layer ``executed`` its number.

    ``kv_bytes`` is the most that keys and values of the call took by layer, seen at the ends of passes. With
    :attr:`Engine.record_decisions`, ``decisions`` [layers, tokens] tells whether each token executed each layer, and
    ``places`` [tokens, 2] which token a column is: the number of its sequence, in the order in which the call began
    them, and its position. A sequence is a prompt, and in scoring a stretch of tokens that some pairs share.
    """

    tokens: int = 0
    passes: int = 0
    executed: list[int] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    _decisions: list[Bools] = field(default_factory=list, repr=False, compare=False)
    _places: list[npt.NDArray[np.int64]] = field(default_factory=list, repr=False, compare=False)
    _numbers: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    @property
    def decisions(self) -> Bools | None:
        """Bool [layers, tokens]; None where they were not recorded."""
        return np.concatenate(self._decisions, axis=1) if self._decisions else None

    @property
    def places(self) -> npt.NDArray[np.int64] | None:
        """Int [tokens, 2]: sequence and position of each column of ``decisions``."""
        return np.concatenate(self._places) if self._places else None

    def record(self, segments: Sequence[Segment], ends: Sequence[int], decisions: Bools) -> None:
        """Add a pass: its ``decisions`` [layers, tokens], and the length of each segment's sequence after it."""
        self._decisions.append(decisions)
        for segment, end in zip(segments, ends, strict=True):
            number = self._numbers.setdefault(segment.sequence, len(self._numbers))
            positions = np.arange(end - segment.tokens, end)
            self._places.append(np.stack([np.full_like(positions, number), positions], axis=1))

    @property
    def execution_ratio(self) -> list[float]:
        """Share of the tokens that each layer executed; 1 where nothing ran."""
        return [count / self.tokens if self.tokens else 1.0 for count in self.executed]


class Passes:
    """The decoder behind a lock that is held for one pass at a time, so that threads take turns.

    Sequences are numbers that stay unique when another decoder takes the place of this one, which ends them.
    """

    def __init__(self, decoder: _core.Decoder, vocab_size: int, context: int, dynamic_length: int = 0) -> None:
        self._decoder: _core.Decoder | None = decoder
        self.vocab_size = vocab_size
        self.context = context
        self._dynamic_length = dynamic_length
        self.record_decisions = False
        self.lock = threading.RLock()
        # The call that each open sequence belongs to.
        self._calls: dict[int, CallReport] = {}
        self._theta: float | None = None
        self._depth: list[bool] | None = None
        # The decoder's own sequence 0, and the number after all that were given out.
        self._first = self._next = 0

    @property
    def decoder(self) -> _core.Decoder:
        """The core's Decoder; InputError where the engine is closed."""
        if self._decoder is None:
            raise InputError("the engine is closed; load the model again.")
        return self._decoder

    def close(self) -> None:
        """Let go of the decoder and its caches."""
        with self.lock:
            self._decoder = None
            self._calls.clear()

    def depends_on_length(self, length: int) -> bool:
        """Whether keys of a text of ``length`` tokens differ from those of its beginning alone (dynamic positions)."""
        return 0 < self._dynamic_length < length

    def replace(self, decoder: _core.Decoder) -> None:
        """Go on with another decoder, set as this one was; sequences that are open end."""
        with self.lock:
            if self._theta is not None:
                decoder.set_theta(self._theta)
            decoder.set_depth(self._depth)
            self._first, self._decoder = self._next, decoder
            self._calls.clear()

    def set_theta(self, theta: float) -> None:
        """See :attr:`Engine.theta`."""
        with self.lock:
            self.decoder.set_theta(theta)
            self._theta = theta

    def set_depth(self, runs: list[bool] | None) -> None:
        """Whether each layer runs, None for all; see :meth:`Engine.set_depth`."""
        with self.lock:
            self.decoder.set_depth(runs)
            self._depth = runs

    @contextmanager
    def sequences(self, count: int) -> Iterator[list[int]]:
        """New sequences that are removed at the end."""
        found: list[int] = []
        try:
            found.extend(self.add() for _ in range(count))
            yield found
        finally:
            for sequence in found:
                self.remove(sequence)

    def add(self) -> int:
        """A new empty sequence."""
        with self.lock:
            sequence = self._first + int(self.decoder.add_sequence())
            self._next = max(self._next, sequence + 1)
            return sequence

    def remove(self, sequence: int) -> None:
        """Forget a sequence; nothing happens where it ended before."""
        with self.lock:
            if self._decoder is not None and sequence >= self._first:
                self._decoder.remove_sequence(sequence - self._first)
            self._calls.pop(sequence, None)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget a sequence's tokens from ``length`` on."""
        with self.lock:
            self.decoder.truncate(self._own(sequence), length)

    def length(self, sequence: int) -> int:
        """Tokens that a sequence holds; 0 where it ended with its decoder."""
        with self.lock:
            ended = self._decoder is None or sequence < self._first
            return 0 if ended else int(self.decoder.length(sequence - self._first))

    def forward(
        self,
        segments: Sequence[Segment],
        tokens: Sequence[int],
        keep: Sequence[int],
        report: CallReport,
        out: Floats | None = None,
    ) -> Floats:
        """Logits [kept, vocab] after the rows ``keep`` (ascending) of all segments' tokens; in ``out`` if it fits."""
        ids, rows = np.asarray(tokens, dtype=np.int32), np.asarray(keep, dtype=np.int64)
        if out is None or len(out) < len(rows):
            out = np.empty((len(rows), self.vocab_size), dtype=np.float32)
        logits = out[: len(rows)]
        with self.lock:
            self.decoder.forward(
                self._segments(segments),
                memory_of(ids, "int32"),
                memory_of(rows, "int64"),
                memory_of(logits, "float32"),
            )
            self._note(segments, report)
        return logits

    def score(
        self,
        segments: Sequence[Segment],
        tokens: Sequence[int],
        keep: npt.NDArray[np.int64],
        targets: npt.NDArray[np.int32],
        report: CallReport,
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Log-probability of a target after each row of ``keep`` (ascending, may repeat); whether it is the best."""
        ids = np.asarray(tokens, dtype=np.int32)
        values, best = np.empty(len(keep), dtype=np.float32), np.empty(len(keep), dtype=np.uint8)
        with self.lock:
            self.decoder.score(
                self._segments(segments),
                memory_of(ids, "int32"),
                memory_of(keep, "int64"),
                memory_of(targets, "int32"),
                memory_of(values, "float32"),
                memory_of(best, "uint8"),
            )
            self._note(segments, report)
        return values, best.astype(bool)

    def _own(self, sequence: int) -> int:
        """The decoder's own number of a sequence; -1, which is none, stays."""
        if sequence < 0:
            return sequence
        if sequence < self._first:
            raise InputError("the engine's weights were changed while this sequence was open; begin it anew.")
        return sequence - self._first

    def _segments(self, segments: Sequence[Segment]) -> list[Segment]:
        # A closed engine says so before its sequences are looked at.
        _ = self.decoder
        if not self._first:
            return list(segments)
        return [each._replace(sequence=self._own(each.sequence), parent=self._own(each.parent)) for each in segments]

    def _note(self, segments: Sequence[Segment], report: CallReport) -> None:
        tokens, executed = self.decoder.report()
        self._calls.update((segment.sequence, report) for segment in segments)
        kv_bytes = self.decoder.kv_bytes([self._own(each) for each, call in self._calls.items() if call is report])
        if self.record_decisions:
            mask = np.empty((len(executed), tokens), dtype=np.uint8)
            self.decoder.decisions(memory_of(mask.reshape(-1), "uint8"))
            report.record(segments, [self.length(segment.sequence) for segment in segments], mask.view(np.bool_))
        report.tokens += tokens
        report.passes += 1
        report.executed = [a + b for a, b in zip(report.executed or [0] * len(executed), executed, strict=True)]
        report.kv_bytes = [max(a, b) for a, b in zip(report.kv_bytes or kv_bytes, kv_bytes, strict=True)]
