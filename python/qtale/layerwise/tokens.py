"""Calibration sequences as arrays of token numbers, checked; ``verb`` names in errors what they are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qtale.errors import InputError

Tokens = npt.NDArray[np.int64]


def check_tokens(tokens: Any, verb: str) -> Tokens:
    """Token numbers as int64 [sequences, length]; InputError for none, ragged, short or negative ones."""
    rows = [np.asarray(row) for row in tokens]
    if not rows:
        raise InputError(f"{verb}: no calibration sequence is given; at least one is needed.")
    length = rows[0].shape[-1] if rows[0].ndim else 0
    for number, row in enumerate(rows):
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise InputError(f"{verb}: sequence {number} must be a row of whole token numbers.")
        if len(row) != length or length < 2:
            raise InputError(
                f"{verb}: sequence {number} has {len(row)} tokens; all must have the same number, at least 2, "
                f"and the first has {length}."
            )
    return np.stack(rows).astype(np.int64)


def check_vocabulary(tokens: Tokens, vocab_size: int, verb: str) -> None:
    """Raise InputError for token numbers that a vocabulary does not have."""
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise InputError(
            f"{verb}: token numbers reach from {tokens.min()} to {tokens.max()}, but the model has {vocab_size}; take "
            "the tokenizer of this model."
        )
