"""What callers give, checked: prompts, pairs of context and continuation, numbers of new tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qtale.engine.score import Request
from qtale.engine.tokenizer import TOKENIZER_FILE, Tokenizer
from qtale.errors import InputError

Prompt = str | Sequence[int]
# New tokens where the caller names no number.
DEFAULT_NEW_TOKENS = 256
PERPLEXITY_WINDOW = 2048


class Inputs:
    """Turns texts and ids into checked token ids of one model.

    ``ends`` are the ids that its configs say end a text. The tokenizer is read when it is first needed.
    """

    def __init__(self, path: Path, vocab_size: int, context: int, ends: frozenset[int]) -> None:
        self.path, self._ends = path, ends
        self.vocab_size, self.context = vocab_size, context

    @cached_property
    def backend(self) -> Tokenizer | None:
        """The folder's tokenizer, None where it has none; CheckpointError where it is broken."""
        return Tokenizer(self.path) if (self.path / TOKENIZER_FILE).is_file() else None

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end a text; where no config names one, that of the tokenizer's eos_token."""
        if self._ends or self.backend is None or self.backend.eos_token is None:
            return self._ends
        token = self.backend.token_id(self.backend.eos_token)
        return frozenset() if token is None else frozenset([token])

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer; InputError where it has none."""
        if self.backend is None:
            raise InputError(f"{self.path}: has no {TOKENIZER_FILE}, so the engine takes token ids only.")
        return self.backend

    def prompts(self, given: Prompt | Sequence[Prompt]) -> tuple[list[list[int]], bool]:
        """Token ids of one prompt or of several, and whether it was one."""
        single = isinstance(given, str) or (len(given) > 0 and _is_token(given[0]))
        several: Sequence[Any] = [given] if single else given
        return [self.tokens_of(prompt) for prompt in several], single

    def tokens_of(self, prompt: Sequence[int] | str) -> list[int]:
        """Checked token ids of a text or of ids; InputError where they are empty, unknown or too many."""
        if not isinstance(prompt, (str, Iterable)):
            raise InputError(f"{prompt!r} is no prompt; give a text, or a list of token ids.")
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [token_of(token) for token in prompt]
        self.check_tokens(tokens)
        return tokens

    def check_tokens(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise InputError("the prompt is empty; give at least one token (a text that begins a document: '\\n').")
        self.check_ids(tokens)
        if len(tokens) > self.context:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, and the context holds {self.context}; shorten it, or load with "
                "a larger context."
            )

    def check_ids(self, tokens: Sequence[int]) -> None:
        wrong = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise InputError(f"token id {wrong} is not known; this model has ids from 0 to {self.vocab_size - 1}.")

    def room(self, prompt: int, asked: int | None) -> int:
        """New tokens for a prompt of so many tokens: those asked for, or a default; InputError for too many."""
        if asked is not None and not (isinstance(asked, int) and asked >= 1):
            raise InputError(f"generate: max_new_tokens {asked!r} must be 1 or more.")
        left = self.context - prompt
        if left < (asked or 1):
            wanted = f"{asked} new tokens" if asked else "a new token"
            raise InputError(
                f"generate: a prompt of {prompt} tokens and {wanted} do not fit the context of {self.context}; shorten "
                "one of them, or load with a larger context."
            )
        return asked or min(left, DEFAULT_NEW_TOKENS)

    def pair(self, context: Prompt, continuation: Prompt) -> Request:
        """Checked ids of a context and its continuation."""
        if isinstance(context, str) and isinstance(continuation, str):
            first, second = self._split_texts(context, continuation)
        else:
            first = self.tokens_of(context)
            second = (
                self.tokenizer.encode(continuation, add_special_tokens=False)
                if isinstance(continuation, str)
                else [token_of(token) for token in continuation]
            )
        if not second:
            raise InputError("loglikelihood: a continuation is empty; it must hold a token or more.")
        self.check_tokens(first)
        self.check_ids(second)
        if len(first) + len(second) - 1 > self.context:
            raise InputError(
                f"loglikelihood: a context of {len(first)} tokens and a continuation of {len(second)} do not fit the "
                f"context of {self.context}; cut the context at its beginning."
            )
        return first, second

    def windows(self, text: Prompt, window: int | None) -> list[Request]:
        """Whole windows of a text that do not overlap, as pairs of their first token and the rest of them.

        What is left after the last one is dropped; a text shorter than ``window`` is one by itself. InputError for
        fewer than two tokens and for windows beyond the context.
        """
        window = min(PERPLEXITY_WINDOW, self.context) if window is None else window
        if not (isinstance(window, int) and 2 <= window <= self.context):
            raise InputError(f"perplexity: window {window!r} must be from 2 to the context of {self.context} tokens.")
        if isinstance(text, str):
            text = self.tokenizer.encode(text, add_special_tokens=False)
        tokens = [token_of(token) for token in text]
        if len(tokens) < 2:
            raise InputError(f"perplexity: {len(tokens)} tokens are too few; two or more are needed.")
        window = min(window, len(tokens))
        starts = range(0, len(tokens) - window + 1, window)
        return [(tokens[at : at + 1], tokens[at + 1 : at + window]) for at in starts]

    def _split_texts(self, context: str, continuation: str) -> Request:
        if not context:
            return [self._first_token()], self.tokenizer.encode(continuation, add_special_tokens=False)
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole, first = self.tokenizer.encode(context + continuation), self.tokenizer.encode(context)
        return first or [self._first_token()], whole[len(first) :]

    def _first_token(self) -> int:
        bos = self.tokenizer.token_id(self.tokenizer.bos_token) if self.tokenizer.bos_token else None
        if bos is None and not self.ends:
            raise InputError(
                "loglikelihood: the context is empty, and this model has no BOS or end token to put there."
            )
        return min(self.ends) if bos is None else bos


def _is_token(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def token_of(value: Any) -> int:
    """A token id as an int; InputError for anything else."""
    if _is_token(value):
        return int(value)
    raise InputError(f"token id {value!r} is no integer; give a text, or a list of token ids.")
