"""A sequence that lives on between calls, as a conversation does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType

from qtale.engine.generate import Batch, Generation, Piece, make_tracks
from qtale.engine.inputs import Inputs, Prompt
from qtale.engine.passes import CallReport, Passes
from qtale.engine.sampling import Sampling, token_sources


class Session:
    """Generates like :meth:`Engine.generate`, one prompt at a time, and keeps the cache of prompt and answer.

    The next prompt reads only what follows the beginning that both share; ``reused`` tells how many tokens that were,
    ``last`` the last generation. Made by :meth:`Engine.session`; ``close`` (or a ``with`` block) frees the cache.
    """

    def __init__(self, passes: Passes, inputs: Inputs, num_threads: int = 0) -> None:
        self._passes, self._inputs, self._num_threads = passes, inputs, num_threads
        self._sequence = passes.add()
        self._held: list[int] = []
        self.reused = 0
        self.last: Generation | None = None
        self.report = CallReport()

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        ignore_end: bool = False,
    ) -> Iterator[Piece]:
        """Pieces of the answer; leaving early (also by Ctrl-C) keeps what was generated until then in ``last``.

        Options and errors are those of :meth:`Engine.generate`.
        """
        options = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        tokens = self._inputs.tokens_of(prompt)
        (track,) = make_tracks(self._inputs, [tokens], max_new_tokens, stop, ignore_end)
        batch = Batch(self._passes, [track], token_sources(1, seed), options, self._num_threads)
        self._rewind(tokens)
        track.sequence, track.read = self._sequence, self.reused
        try:
            yield from batch.run()
        finally:
            ran = self._passes.length(self._sequence)
            self._held = [*track.prompt, *track.tokens][:ran]
            self.last, self.report = track.result(), batch.report

    def close(self) -> None:
        """Free the cache."""
        if self._sequence >= 0:
            self._passes.remove(self._sequence)
        self._sequence = -1

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _rewind(self, tokens: Sequence[int]) -> None:
        """Cut the cache back to the beginning it shares with ``tokens``; the last of them always runs."""
        most = min(len(self._held), len(tokens) - 1)
        if self._passes.depends_on_length(max(len(self._held), len(tokens))):
            most = 0
        self.reused = next((i for i in range(most) if self._held[i] != tokens[i]), most)
        self._passes.truncate(self._sequence, self.reused)
        self._held = self._held[: self.reused]
