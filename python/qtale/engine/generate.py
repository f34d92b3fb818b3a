"""Generation: prompts are read in ragged passes, then all unfinished sequences take one token a pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from qtale.engine.inputs import Inputs
from qtale.engine.passes import CallReport, Floats, Passes, Segment
from qtale.engine.sampling import Sampling, choose
from qtale.engine.text import StoppedText, checked_stops
from qtale.engine.tokenizer import Tokenizer
from qtale.errors import InputError
from qtale.memory.runtime import PASS_TOKENS

if TYPE_CHECKING:
    from qtale._core import TokenSource

# Sequences that run at a time; more wait until one ends.
MAX_BATCH = 32


class Options(TypedDict, total=False):
    """Keywords of :meth:`qtale.engine.Engine.generate`, for type checkers."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: str | Sequence[str] | None
    seed: int | Sequence[int] | None
    ignore_end: bool


@dataclass(frozen=True)
class Generation:
    """What came after one prompt. ``tokens`` include the one that ended it.

    ``text`` is without special tokens and up to a stop string, None where the model has no tokenizer;
    ``finish_reason`` is "stop" (an end token or a stop string) or "length"; ``str()`` gives the text.
    """

    tokens: tuple[int, ...]
    text: str | None
    finish_reason: str
    prompt_tokens: int

    def __str__(self) -> str:
        return " ".join(map(str, self.tokens)) if self.text is None else self.text


class Piece(str):
    """Streamed text: ``prompt`` is the number of its prompt, ``tokens`` are new, the last has a ``finish_reason``."""

    prompt: int
    tokens: tuple[int, ...]
    finish_reason: str | None

    @classmethod
    def of(cls, text: str, prompt: int, tokens: tuple[int, ...], finish_reason: str | None) -> Piece:
        """A piece of one sequence."""
        piece = cls(text)
        piece.prompt, piece.tokens, piece.finish_reason = prompt, tokens, finish_reason
        return piece


@dataclass(frozen=True)
class Limits:
    """When sequences end: ``max_new_tokens`` by sequence, ``ends`` are token ids, ``stops`` are texts."""

    max_new_tokens: tuple[int, ...]
    ends: frozenset[int]
    stops: tuple[str, ...]


class Track:
    """One sequence: its prompt, what was generated, and its text."""

    def __init__(self, index: int, prompt: Sequence[int], limits: Limits, tokenizer: Tokenizer | None) -> None:
        self.index, self.prompt, self.tokens = index, list(prompt), list[int]()
        self.read = 0
        self.sequence = -1
        self.finish_reason: str | None = None
        self._limits = limits
        self._text = None if tokenizer is None else StoppedText(tokenizer.stream(), limits.stops)

    def take(self, token: int) -> Piece:
        """Add a token; returns its piece of text and notes whether the sequence ends with it."""
        self.tokens.append(token)
        text = ""
        if token in self._limits.ends:
            self.finish_reason = "stop"
        elif self._text is not None:
            text = self._text.push(token)
            self.finish_reason = "stop" if self._text.stopped else None
        if self.finish_reason is None and len(self.tokens) >= self._limits.max_new_tokens[self.index]:
            self.finish_reason = "length"
        if self.finish_reason and self._text is not None:
            text += self._text.flush()
            self.finish_reason = "stop" if self._text.stopped else self.finish_reason
        return Piece.of(text, self.index, (token,), self.finish_reason)

    def result(self) -> Generation:
        """The finished generation."""
        text = None if self._text is None else self._text.text
        return Generation(tuple(self.tokens), text, self.finish_reason or "length", len(self.prompt))


class Batch:
    """Runs tracks to their ends; ``close`` forgets the sequences that were made here."""

    def __init__(
        self,
        passes: Passes,
        tracks: Sequence[Track],
        sources: Sequence[TokenSource],
        options: Sampling,
        num_threads: int = 0,
    ) -> None:
        self._passes, self._options, self._num_threads = passes, options, num_threads
        self._sources = {track.index: source for track, source in zip(tracks, sources, strict=True)}
        self._waiting = deque(tracks)
        self._running: list[Track] = []
        self._own: set[int] = set()
        self._logits: Floats | None = None
        self.report = CallReport()

    def run(self) -> Iterator[Piece]:
        """Pieces of all sequences as they come."""
        try:
            while self._waiting or self._running:
                self._admit()
                yield from self._step()
        finally:
            self.close()

    def close(self) -> None:
        """Remove the sequences that are left."""
        while self._own:
            self._remove(next(iter(self._own)))

    def _remove(self, sequence: int) -> None:
        # In this order, so that what Ctrl-C falls between is removed again.
        self._passes.remove(sequence)
        self._own.discard(sequence)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < MAX_BATCH:
            track = self._waiting.popleft()
            if track.sequence < 0:
                track.sequence = self._passes.add()
                self._own.add(track.sequence)
            self._see(track, track.prompt)
            self._running.append(track)

    def _see(self, track: Track, tokens: Sequence[int]) -> None:
        """Note tokens where a penalty asks which there were."""
        if self._options.repetition_penalty != 1.0:
            self._sources[track.index].see(tokens)

    def _step(self) -> Iterator[Piece]:
        """One pass: the next tokens of prompts if some are unread, else one token of every sequence."""
        segments, tokens, ends = self._unread() or self._next_tokens()
        logits = self._passes.forward(segments, tokens, [row for _, row in ends], self.report, self._logits)
        # Kept for the next pass: fresh memory of this size costs more than choosing from it.
        self._logits = logits if self._logits is None or len(logits) > len(self._logits) else self._logits
        yield from self._taken([track for track, _ in ends], logits)
        for track in [track for track in self._running if track.finish_reason]:
            self._running.remove(track)
            if track.sequence in self._own:
                self._remove(track.sequence)

    def _taken(self, tracks: Sequence[Track], logits: Floats) -> list[Piece]:
        if not tracks:
            return []
        sources = [self._sources[track.index] for track in tracks]
        # The threads of the core are one pool: a pass of another call that ran meanwhile would have but one of them.
        with self._passes.lock:
            chosen = choose(logits, sources, self._options, self._num_threads)
        pieces = []
        for track, token in zip(tracks, chosen, strict=True):
            self._see(track, [token])
            pieces.append(track.take(token))
        return pieces

    def _unread(self) -> tuple[list[Segment], list[int], list[tuple[Track, int]]] | None:
        segments: list[Segment] = []
        tokens: list[int] = []
        ends: list[tuple[Track, int]] = []
        for track in self._running:
            count = min(len(track.prompt) - track.read, PASS_TOKENS - len(tokens))
            if count > 0:
                segments.append(Segment(track.sequence, -1, count, len(track.prompt)))
                tokens.extend(track.prompt[track.read : track.read + count])
                track.read += count
                if track.read == len(track.prompt):
                    ends.append((track, len(tokens) - 1))
        return (segments, tokens, ends) if segments else None

    def _next_tokens(self) -> tuple[list[Segment], list[int], list[tuple[Track, int]]]:
        segments = [Segment(track.sequence, -1, 1) for track in self._running]
        tokens = [track.tokens[-1] for track in self._running]
        return segments, tokens, [(track, row) for row, track in enumerate(self._running)]


def make_tracks(
    inputs: Inputs,
    prompts: Sequence[list[int]],
    max_new_tokens: int | None,
    stop: str | Sequence[str] | None,
    ignore_end: bool,
) -> list[Track]:
    """Tracks of checked prompts; InputError for stops that are no texts and prompts that leave no room."""
    stops = checked_stops(stop)
    if stops and inputs.backend is None:
        raise InputError("generate: stop strings need a tokenizer, which this model's folder has not.")
    room = tuple(inputs.room(len(prompt), max_new_tokens) for prompt in prompts)
    limits = Limits(room, frozenset() if ignore_end else inputs.ends, stops)
    return [Track(index, prompt, limits, inputs.backend) for index, prompt in enumerate(prompts)]
