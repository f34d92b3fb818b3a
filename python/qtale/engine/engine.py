"""``qtale.load``: a model of the Llama family that runs in C++, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import numpy.typing as npt

from qtale.checkpoint.folder import ModelFolder, open_folder
from qtale.engine.change import WeightChange
from qtale.engine.generate import Batch, Generation, Options, Piece, make_tracks
from qtale.engine.inputs import Inputs, Prompt
from qtale.engine.layout import WeightOptions
from qtale.engine.model import LoadedModel, LoadOptions, LoadReport
from qtale.engine.passes import CallReport, Passes, Segment
from qtale.engine.sampling import Sampling, token_sources
from qtale.engine.score import loglikelihoods
from qtale.engine.session import Session
from qtale.engine.tokenizer import Tokenizer, end_tokens
from qtale.errors import InputError
from qtale.memory.runtime import PASS_TOKENS
from qtale.memory.sizes import human_bytes
from qtale.routing import checked_theta, depth_mask
from qtale.spec import QuantSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
    kv_rule: str | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Engine:
    """Load a folder or hub name of the Llama family (llama, mistral, qwen2, qwen3) to run in C++.

    The folder is dense (float32, float16, bfloat16) or in compressed-tensors ``pack-quantized`` form. ``bits`` (2, 3,
    4, 8; with ``group_size`` and ``symmetric`` as in :class:`qtale.QuantSpec`) rounds a dense one while it is read,
    ``lm_head_bits`` (8, 4) the head. ``compute`` is how layers multiply: "int8" rounds the activations of quantized
    ones to 8 bits (fast), "int16" to 16 bits (as fast for a token or two, slower for prompts), "float" takes them as
    they are, "bfloat16" is "float" but multiplies what is not quantized in bfloat16, twice as fast: AVX-512 BF16 only.
    ``context`` bounds the tokens of a sequence (default: max_position_embeddings). ``kv_dtype`` is "float16",
    "float32", "int8-keys" (keys rotated by a Hadamard matrix and rounded to 8 bits; with AVX-512 BF16), or "auto":
    float32 for models stored in it, 8-bit keys for ``compute="int8"`` where every layer is quantized and the CPU has
    them, else float16. ``kv_rule`` is what tokens that skip a layer leave in it ("evict": nothing, "keep": keys and
    values; default as the model's routing says). ``num_threads`` (1 to 1024) is for calls of this engine alone; loading
    runs on as many as the process uses (``QTALE_NUM_THREADS``).

    ``cache`` keeps the packed weights, so that the next load only reads them: "auto" in HuggingFace's asset cache, or a
    folder (default: nowhere). A file is as large as the weights and fits one model, CPU kind and choice of options.

    Memory peaks at the size of the packed weights and one block more. Raises UnsupportedError for models that only
    :func:`qtale.load_torch` runs, CheckpointError for broken folders, InputError for options that do not fit, Error
    where the memory cannot hold the weights (told before they are read), NetworkError.
    """
    weights = WeightOptions(None if bits is None else QuantSpec(bits, _group(group_size), symmetric), lm_head_bits)
    options = LoadOptions(compute, context, kv_dtype, kv_rule, num_threads)
    return load_folder(open_folder(model), weights, options, cache, progress)


def load_folder(
    folder: ModelFolder,
    weights: WeightOptions,
    options: LoadOptions,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Engine:
    """As :func:`load`, of a folder that is open, with options that are checked."""
    ends = end_tokens(folder.path, folder.config)
    return Engine(LoadedModel(folder, weights, options, cache, progress), folder.path, ends)


def _group(group_size: int | str) -> int | str:
    text = str(group_size)
    return int(text) if text.isdecimal() else text


class Engine:
    """A loaded model; made by :func:`qtale.load`. ``routed_layers`` are the numbers of those that have a router.

    May be used from several threads: passes of the decoder take turns, so calls wait for each other's passes. Two
    engines do not disturb one another. ``close`` (or leaving a ``with`` block) frees weights and caches; streams that
    are still open then end with an error.
    """

    def __init__(self, model: LoadedModel, path: Path, ends: frozenset[int] = frozenset()) -> None:
        self._model: LoadedModel | None = model
        self._passes = Passes(
            model.make_decoder(), model.spec.vocab_size, model.context, model.spec.rope.dynamic_length
        )
        self._inputs = Inputs(path, model.spec.vocab_size, model.context, ends)
        self._theta = model.routing.theta
        self._num_threads = model.options.num_threads or 0
        self.routed_layers = tuple(sorted(model.routing.routers))
        self.path = path
        self.spec = model.spec
        self.context = model.context
        self.load_report: LoadReport = model.report
        self.report = CallReport()

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer, read when first needed; InputError where it has none."""
        return self._inputs.tokenizer

    @property
    def end_tokens(self) -> frozenset[int]:
        """The ids that end a text."""
        return self._inputs.ends

    def logits(self, ids: Prompt) -> Floats:
        """Logits [n, vocab] after each of n tokens (or of a text's tokens); raises InputError for wrong ids."""
        tokens = self._inputs.tokens_of(ids)
        report = CallReport()
        parts = []
        with self._passes.sequences(1) as (sequence,):
            for start in range(0, len(tokens), PASS_TOKENS):
                piece = tokens[start : start + PASS_TOKENS]
                segment = Segment(sequence, -1, len(piece), len(tokens))
                parts.append(self._passes.forward([segment], piece, range(len(piece)), report))
        self.report = report
        return np.concatenate(parts)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts too
        self,
        prompts: Prompt,
        max_new_tokens: int | None = ...,
        *,
        stream: Literal[False] = ...,
        **options: Unpack[Options],
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | None = ...,
        *,
        stream: Literal[False] = ...,
        **options: Unpack[Options],
    ) -> list[Generation]: ...
    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = ...,
        *,
        stream: Literal[True],
        **options: Unpack[Options],
    ) -> Iterator[Piece]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
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
        stream: bool = False,
    ) -> Generation | list[Generation] | Iterator[Piece]:
        """Continue one prompt (a text or a list of token ids) or several (a list of these).

        ``temperature`` 0 is greedy; see :class:`qtale.engine.sampling.Sampling` for it and the filters after it.
        ``max_new_tokens`` is by default what the context leaves, at most 256. Texts end before the first ``stop``
        string, and with an end token of the model unless ``ignore_end``. The same ``seed`` draws the same tokens:
        sequence i of a call takes the numbers of (seed, i); a list of seeds gives each prompt what it draws alone.

        Returns a :class:`Generation` (``tokens``, ``text``, ``finish_reason``; ``print`` shows the text), or a list of
        them in the prompts' order. With ``stream`` returns an iterator of text pieces instead, which know the
        number of their ``prompt``; leaving it early frees what it holds. Prompts of a call are read and continued in
        common passes, each getting what it would get alone. Raises InputError for empty prompts, unknown token ids,
        prompts that leave no room in the context, and values that are not accepted.
        """
        options = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        tokens, single = self._inputs.prompts(prompts)
        tracks = make_tracks(self._inputs, tokens, max_new_tokens, stop, ignore_end)
        batch = Batch(self._passes, tracks, token_sources(len(tracks), seed), options, self._num_threads)
        if stream:
            return self._streamed(batch)
        for _ in self._streamed(batch):
            pass
        results = [track.result() for track in tracks]
        return results[0] if single else results

    def _streamed(self, batch: Batch) -> Iterator[Piece]:
        try:
            yield from batch.run()
        finally:
            self.report = batch.report

    def session(self) -> Session:
        """A sequence that keeps its cache: prompts that begin as the last one did read only what is new."""
        return Session(self._passes, self._inputs, self._num_threads)

    def loglikelihood(
        self, requests: Sequence[tuple[Prompt, Prompt]], progress: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding gives it) of each (context, continuation).

        Pairs of texts are split into tokens as lm-eval does: spaces that end the context go to the continuation. An
        empty context text is the model's first token (BOS, else an end token). Contexts that begin alike run what they
        share once, whatever the order of the requests. Natural logarithms, summed over the continuation's tokens.
        Raises InputError for empty parts and for pairs longer than the context.
        """
        pairs = [self._inputs.pair(context, continuation) for context, continuation in requests]
        report = CallReport()
        answers = loglikelihoods(self._passes, pairs, report, progress)
        self.report = report
        return answers

    def perplexity(self, text: Prompt, window: int | None = None, progress: bool = False) -> float:
        """exp of the mean negative log-likelihood over whole windows that do not overlap.

        As GPTQ and its followers measure it (https://arxiv.org/abs/2210.17323): windows of ``window`` tokens (default
        2048, or the context where that is less), no BOS is added, each window starts anew and its first token is not
        predicted. What is left after the last window is dropped; a text shorter than one is a window by itself.
        Raises InputError for fewer than two tokens or a window beyond the context.
        """
        pairs = self._inputs.windows(text, window)
        answers = self.loglikelihood(pairs, progress)
        return math.exp(-math.fsum(value for value, _ in answers) / sum(len(ending) for _, ending in pairs))

    @property
    def theta(self) -> float:
        """Probability from which on a token runs a layer that has a router."""
        return self._theta

    @theta.setter
    def theta(self, value: float) -> None:
        theta = checked_theta(value)
        self._passes.set_theta(theta)
        self._theta = theta

    @property
    def record_decisions(self) -> bool:
        """Whether reports hold every token's ``decisions``, a byte for each layer; off at first."""
        return self._passes.record_decisions

    @record_decisions.setter
    def record_decisions(self, value: bool) -> None:
        self._passes.record_decisions = bool(value)

    def set_depth(self, layers: Sequence[int] | None) -> None:
        """Run these layers only, by number, skipping all others for every token; None runs all again.

        Caches of sessions made before hold what ran then. Raises InputError for numbers that are no layers.
        """
        self._passes.set_depth(depth_mask(layers, self.spec.num_layers))

    def change(self) -> WeightChange:
        """Other bits for some of the weights, as :meth:`qtale.Deployment.replan` gives them; a context manager."""
        if self._model is None:
            raise InputError("the engine is closed; load the model again.")
        return WeightChange(self._model, self._passes)

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
        state = "closed"
        if self._model is not None:
            bits = ", ".join(map(str, self._model.layout.bits))
            state = f"weights of {bits} bits in {human_bytes(self._model.layout.nbytes)}"
        return (
            f"Engine({self.path.name}: {spec.model_type}, {spec.num_layers} layers of {spec.hidden_size}, "
            f"context {self.context}, {state})"
        )
