"""The engine as a language model of EleutherAI's lm-evaluation-harness.

Requests, truncation and rolling windows are those of the harness's own ``HFLM``, so that answers are comparable one by
one; scoring and generation run in C++ (:class:`qtale.Engine`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm.auto import tqdm

from qtale.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qtale.engine import Engine

Request = tuple[tuple[str, str] | None, list[int], list[int]]
Answer = tuple[float, bool]

_MAX_GEN_TOKS = 256
_TEXTS = 1024  # that are tokenized at once
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class EngineLM(TemplateLM):  # type: ignore[misc]
    """A causal language model for ``lm_eval.simple_evaluate``.

    ``tokenizer`` is transformers' one of the same folder, which the harness's templates need. ``max_length`` bounds
    inputs in tokens (default: the engine's context). ``add_bos_token`` None leaves it to the tokenizer.
    """

    backend_name = "engine"

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__()
        if max_length is not None and max_length > engine.context:
            raise InputError(f"max_length {max_length}: the engine's context holds {engine.context} tokens.")
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_length = max_length or engine.context
        self.add_bos_token = add_bos_token
        self.batch_size = "auto"
        self.requests_done = 0
        self.tokens_done = 0
        self.seconds = 0.0
        self._device = torch.device("cpu")
        self._encoded: dict[str, list[int]] = {}

    @property
    def device(self) -> torch.device:
        """Where the engine computes."""
        return self._device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the first token of the vocabulary's texts, else the last one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For the names of cached requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens are added as told, else as the tokenizer does, but never a second BOS."""
        if add_special_tokens is not None:
            return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))
        if string in self._encoded:
            return list(self._encoded[string])
        return list(self.tokenizer.encode(string, **self._special(string)))

    def _special(self, string: str) -> dict[str, Any]:
        """Options of the tokenizer for a text whose special tokens nobody chose."""
        chosen = False if string.startswith(self._prefix) else self.add_bos_token
        return {} if chosen is None else {"add_special_tokens": chosen}

    @cached_property
    def _prefix(self) -> str:
        return str(self.tokenizer.decode(self.prefix_token_id))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Answer]:
        """(sum of log-probabilities, whether greedy decoding gives it) of each request's (context, continuation)."""
        # What the harness encodes of them one by one, together: that takes half of the time.
        pairs = [request.args for request in requests]
        texts = {text for context, end in pairs if context for text in (context + end, context.rstrip())}
        self._encoded = self._encode_all(sorted(texts), disable_tqdm)
        try:
            return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))
        finally:
            self._encoded = {}

    def _encode_all(self, texts: Sequence[str], disable_tqdm: bool) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for special in (False, True):
            alike = [text for text in texts if text.startswith(self._prefix) == special]
            for start in tqdm(range(0, len(alike), _TEXTS), desc="tokenizing", delay=1, disable=disable_tqdm):
                some = alike[start : start + _TEXTS]
                encoded = self.tokenizer(some, return_attention_mask=False, **self._special(some[0]))
                found |= zip(some, encoded["input_ids"], strict=True)
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without its system part where the template refuses one."""

        def rendered(history: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        try:
            return rendered(chat_history)
        except jinja2.TemplateError:
            return rendered([message for message in chat_history if message["role"] != "system"])

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **options: Any
    ) -> list[Answer]:
        """(sum of log-probabilities, whether greedy decoding gives it) of each (key, context, continuation)."""
        start = time.perf_counter()
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        answers = self.engine.loglikelihood(pairs, progress=not disable_tqdm) if pairs else []
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        self.requests_done += len(requests)
        self.tokens_done += self.engine.report.tokens if pairs else 0
        self.seconds += time.perf_counter() - start
        return answers

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """A pair cut from the left to what the model can read, as HFLM cuts it."""
        if len(continuation) > self.max_length:
            raise InputError(
                f"eval: a continuation of {len(continuation)} tokens is longer than the {self.max_length} that the "
                "model reads."
            )
        whole = (context + continuation)[-(self.max_length + 1) :]
        return whole[: -len(continuation)], continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the longest input that do not overlap."""
        windows: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(None, *make_disjoint_window(part)) for part in parts]
            windows += found
            counts.append(len(found))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(answers)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts after each context, up to its stop strings; requests with the same options run together."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        start = time.perf_counter()
        for members in groups.values():
            for index, text in zip(members, self._generated([requests[index] for index in members]), strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        self.requests_done += len(requests)
        self.seconds += time.perf_counter() - start
        return texts

    def _generated(self, requests: Sequence[Any]) -> list[str]:
        options = dict(normalize_gen_kwargs(requests[0].args[1], _MAX_GEN_TOKS))
        new_tokens, until = int(options["max_gen_toks"]), list(options["until"])
        room = self.max_length - new_tokens
        if room < 1:
            raise InputError(
                f"eval: {new_tokens} tokens to generate leave no room in the {self.max_length} that the model reads."
            )
        sampling = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
        prompts = [self.tok_encode(request.args[0])[-room:] for request in requests]
        found = self.engine.generate(prompts, new_tokens, stop=until or None, **sampling)
        self.tokens_done += self.engine.report.tokens
        return [postprocess_generated_text(str(generation), until, None) for generation in found]
