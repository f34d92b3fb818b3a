"""Perplexity on WikiText-2 as GPTQ and its followers measure it: non-overlapping windows over the joined text.

Frantar et al., GPTQ (https://arxiv.org/abs/2210.17323). Each window starts anew: its first token is not predicted.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qtale.errors import InputError, NetworkError
from qtale.eval.catalog import TASKS, WIKITEXT
from qtale.eval.sources import Source

if TYPE_CHECKING:
    from qtale.integrations.engine_lm import EngineLM
    from qtale.integrations.lm_eval import QtaleLM

logger = logging.getLogger("qtale")

WINDOW = 2048
_HUB_SET = ("Salesforce/wikitext", "wikitext-2-raw-v1")


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (natural) of the predicted tokens of the first ``windows`` windows."""

    perplexity: float
    windows: int
    windows_in_text: int
    window_tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def wikitext2(source: Source) -> str:
    """The test set of WikiText-2 as its raw file has it; NetworkError where the hub does not give it."""
    if source.folder is not None:
        return (source.folder / TASKS[WIKITEXT].file("test")).read_text(encoding="utf-8")
    import datasets

    try:
        rows = datasets.load_dataset(*_HUB_SET, split="test")
    except (OSError, ValueError) as error:
        raise NetworkError(f"wikitext: the hub does not give {_HUB_SET[0]} ({error}); use --data DIR.") from error
    # The hub's copy has "" for the file's blank lines.
    return "".join(text or " \n" for text in rows["text"])


def perplexity(
    lm: EngineLM | QtaleLM, text: str, windows: int | None = None, window_tokens: int = WINDOW
) -> Perplexity:
    """Perplexity over the first ``windows`` (default all) windows of ``window_tokens`` tokens; no BOS is added.

    Raises InputError where the text is shorter than one window.
    """
    tokens = lm.tok_encode(text, add_special_tokens=False)
    whole = len(tokens) // window_tokens
    count = whole if windows is None else min(windows, whole)
    if count < 1:
        raise InputError(
            f"perplexity: {windows if whole else len(tokens)} {'windows' if whole else 'tokens'} are too few; "
            f"at least one window of {window_tokens} tokens is needed."
        )
    logger.info("eval: perplexity over %d of %d windows of %d tokens", count, whole, window_tokens)
    starts = range(0, count * window_tokens, window_tokens)
    start = time.perf_counter()
    requests = [(None, tokens[at : at + 1], tokens[at + 1 : at + window_tokens]) for at in starts]
    answers = lm._loglikelihood_tokens(requests)
    mean = -math.fsum(value for value, _ in answers) / (count * (window_tokens - 1))
    return Perplexity(math.exp(mean), count, whole, window_tokens, time.perf_counter() - start)
