"""``qtale.load``: a model of the Llama family that runs in C++, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from qtale.checkpoint.folder import open_folder
from qtale.engine.layout import WeightOptions
from qtale.engine.model import LoadedModel, LoadOptions, LoadReport
from qtale.engine.passes import PASS_TOKENS, CallReport, Passes
from qtale.engine.tokenizer import TOKENIZER_FILE, Tokenizer, end_tokens
from qtale.errors import InputError
from qtale.memory.sizes import human_bytes
from qtale.spec import QuantSpec

Floats = npt.NDArray[np.float32]


def load(
    model: str | Path,
    *,
    compute: str = "int8",
    bits: int | None = None,
    group_size: int | str = "auto",
    symmetric: bool = True,
    lm_head_bits: int | None = None,
    num_threads: int | None = None,
    context: int | None = None,
    kv_dtype: str = "auto",
    kv_rule: str = "evict",
    cache: str | Path | None = None,
    progress: bool = True,
) -> Engine:
    """Load a folder or hub name of the Llama family (llama, mistral, qwen2, qwen3) to run in C++.

    The folder is dense (float32, float16, bfloat16) or in compressed-tensors ``pack-quantized`` form. ``bits``
    (2, 3, 4, 8; with ``group_size`` and ``symmetric`` as in :class:`qtale.QuantSpec`) rounds a dense one while it is
    read; ``lm_head_bits`` (8 or 4) rounds the head, which at small sizes is half of what each token reads. ``compute``
    is how quantized layers multiply: "int8" rounds activations to 8 bits (fast), "float" takes them as they are.
    ``context`` bounds the tokens of a sequence (default: max_position_embeddings). ``kv_dtype`` is "float16",
    "float32", or "auto": float32 for models stored in it. ``num_threads`` is for this engine alone.

    ``cache`` keeps the weights in the form that this CPU reads, which makes the next load as fast as reading them:
    "auto" in HuggingFace's asset cache, or a folder; by default nothing is written. A cache file is as large as the
    weights in memory and belongs to one model, CPU kind and choice of options; others are never read.

    Memory peaks at the size of the packed weights and one block more. Raises UnsupportedError for models that the
    engine does not run (:func:`qtale.load_torch` does), CheckpointError for broken folders, InputError for options
    that do not fit, Error where the memory cannot hold the weights (told before they are read), NetworkError.
    """
    quantize = None if bits is None else QuantSpec(bits, _group(group_size), symmetric)
    weights = WeightOptions(quantize, lm_head_bits)
    options = LoadOptions(compute, context, kv_dtype, kv_rule, num_threads)
    folder = open_folder(model)
    loaded = LoadedModel(folder, weights, options, cache, progress)
    tokenizer = Tokenizer(folder.path) if (folder.path / TOKENIZER_FILE).is_file() else None
    return Engine(loaded, folder.path, tokenizer, end_tokens(folder.path, folder.config, tokenizer))


def _group(group_size: int | str) -> int | str:
    text = str(group_size)
    return int(text) if text.isdecimal() else text


class Engine:
    """A loaded model; made by :func:`qtale.load`.

    May be used from several threads: passes of the decoder take turns, so calls wait for each other's passes. Two
    engines do not disturb one another. ``close`` (or leaving a ``with`` block) frees weights and caches; streams that
    are still open then end with an error.
    """

    def __init__(
        self, model: LoadedModel, path: Path, tokenizer: Tokenizer | None, ends: frozenset[int] = frozenset()
    ) -> None:
        self._model: LoadedModel | None = model
        self._tokenizer = tokenizer
        self._passes = Passes(model.decoder, model.spec.vocab_size, model.context)
        self._theta = 0.5
        self.path = path
        self.spec = model.spec
        self.context = model.context
        self.end_tokens = ends
        self.load_report: LoadReport = model.report
        self.report = CallReport()

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer; InputError where it has none."""
        if self._tokenizer is None:
            raise InputError(f"{self.path}: has no {TOKENIZER_FILE}, so the engine takes token ids only.")
        return self._tokenizer

    def logits(self, ids: Sequence[int] | str) -> Floats:
        """Logits [n, vocab] after each of n tokens (or of a text's tokens); raises InputError for wrong ids."""
        tokens = self.tokens_of(ids)
        report = CallReport()
        parts = []
        with self._passes.sequences(1) as (sequence,):
            for start in range(0, len(tokens), PASS_TOKENS):
                piece = tokens[start : start + PASS_TOKENS]
                parts.append(self._passes.forward([(sequence, -1, len(piece))], piece, range(len(piece)), report))
        self.report = report
        return np.concatenate(parts)

    def tokens_of(self, prompt: Sequence[int] | str) -> list[int]:
        """Checked token ids of a text or of ids; InputError where they are empty, unknown or too many."""
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [_token(token) for token in prompt]
        self._check_tokens(tokens)
        return tokens

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise InputError("the prompt is empty; give at least one token (a text that begins a document: '\\n').")
        wrong = next((token for token in tokens if not 0 <= token < self.spec.vocab_size), None)
        if wrong is not None:
            raise InputError(f"token id {wrong} is not known; this model has ids from 0 to {self.spec.vocab_size - 1}.")
        if len(tokens) > self.context:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, and the context holds {self.context}; shorten it, or load with "
                "a larger context."
            )

    @property
    def theta(self) -> float:
        """Probability from which on a token runs a layer that has a router."""
        return self._theta

    @theta.setter
    def theta(self, value: float) -> None:
        if not 0.0 <= float(value) <= 1.0:
            raise InputError(f"theta {value!r} must be a probability from 0 to 1.")
        with self._passes.lock:
            self._passes.decoder.set_theta(float(value))
        self._theta = float(value)

    def set_depth(self, layers: Sequence[int] | None) -> None:
        """Run these layers only, by number, skipping all others for every token; None runs all again.

        Caches of sessions made before hold what ran then. Raises InputError for numbers that are no layers.
        """
        runs = None
        if layers is not None:
            wrong = next((layer for layer in layers if not 0 <= layer < self.spec.num_layers), None)
            if wrong is not None:
                raise InputError(f"set_depth: there is no layer {wrong}; they are 0 to {self.spec.num_layers - 1}.")
            chosen = set(layers)
            runs = [layer in chosen for layer in range(self.spec.num_layers)]
        with self._passes.lock:
            self._passes.decoder.set_depth(runs)

    def close(self) -> None:
        """Free weights and caches; later calls raise InputError."""
        self._passes.close()
        self._model = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        spec = self.spec
        state = "closed" if self._model is None else f"weights {human_bytes(self.load_report.weights_bytes)}"
        return (
            f"Engine({self.path.name}: {spec.model_type}, {spec.num_layers} layers of {spec.hidden_size}, "
            f"context {self.context}, {state})"
        )


def _token(value: Any) -> int:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    raise InputError(f"token id {value!r} is no integer; give a text, or a list of token ids.")
