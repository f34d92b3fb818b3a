"""Text as it streams out of a sequence: whole characters, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

from qtale.engine.tokenizer import TextStream
from qtale.errors import InputError


def checked_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings as a tuple; InputError for empty ones."""
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(each, str) and each for each in stops):
        raise InputError(f"generate: stop {stop!r} must be texts that are not empty.")
    return stops


class StoppedText:
    """Pieces of text up to the first stop string; ``stopped`` tells that one came.

    What may be the beginning of a stop string is held back until it is known.
    """

    def __init__(self, stream: TextStream, stops: tuple[str, ...]) -> None:
        self._stream, self._stops = stream, stops
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""
        return self._take(self._stream.push(token))

    def flush(self) -> str:
        """The rest, when no token follows."""
        if self.stopped:
            return ""
        piece = self._take(self._stream.flush())
        rest, self._held = ("", "") if self.stopped else (self._held, "")
        self.text += rest
        return piece + rest

    def _take(self, piece: str) -> str:
        self._held += piece
        found = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
        else:
            keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
            out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
