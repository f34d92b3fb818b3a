"""Models that qtale loads, as a language model of EleutherAI's lm-evaluation-harness.

``QtaleLM`` is the harness's own ``HFLM`` with one thing replaced: log-likelihood requests that begin alike (the choices
of a question, the few-shot examples of a task) are read once, as a prefix tree. Tokenization, truncation, rolling
windows, generation and every metric stay the harness's.

Scores equal HFLM's to rounding. With ``compute="int8"`` rounding is coarser: activations that differ in their last
digit may round to different 8-bit codes, so how requests are packed moves a score about as much as the mode itself
does; 16 bits, the default, make 254th parts of it. The same run gives the same bits.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm.auto import tqdm

from qtale.integrations.prefix_tree import PrefixTree, pack
from qtale.integrations.scoring_model import load_model, load_tokenizer, model_dtype, spec_of
from qtale.nn import QLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("qtale")

Request = tuple[tuple[str, str] | None, list[int], list[int]]
Answer = tuple[float, bool]

# Tokens a pass: enough rows to keep the kernels busy, few enough that attention over other questions stays cheap.
TOKENS_PER_PASS = {"cpu": 256, "cuda": 4096}
_GENERATION_BATCH = 8
_LOGIT_ROWS = 256
_PROBED_REQUESTS = 4
# Far above rounding, far below what a wrong mask or position does; the second is for 16-bit models.
_PROBE_TOLERANCE, _PROBE_TOLERANCE_16 = 1e-3, 0.02


@register_model("qtale")
class QtaleLM(HFLM):  # type: ignore[misc]
    """A causal language model for ``lm_eval.simple_evaluate``.

    ``pretrained`` is a loaded transformers model (then ``tokenizer`` is needed unless its folder is known) or a folder,
    hub name or "demo", which is loaded: dense, quantized by qtale, or dense and quantized in memory when ``bits`` is
    given. ``batch_size`` is the number of sequences a pass, "auto" as many as make ``tokens_per_pass`` tokens.
    Other keywords are HFLM's (``max_length``, ``add_bos_token``, ``prefix_token_id`` ...).
    Raises InputError, CheckpointError, UnsupportedError or NetworkError where the model cannot be loaded as asked.
    """

    backend_name = "torch"

    def __init__(
        self,
        pretrained: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        *,
        bits: int | None = None,
        group_size: int | str = "auto",
        symmetric: bool = True,
        compute: str = "int16",
        dtype: str = "default",
        device: str | None = None,
        batch_size: int | str | None = "auto",
        max_batch_size: int | None = None,
        tokens_per_pass: int | None = None,
        trust_remote_code: bool = False,
        **hflm_options: Any,
    ) -> None:
        if isinstance(pretrained, (str, Path)):
            spec = spec_of(bits, group_size, symmetric)
            device = device or "cpu"
            model = load_model(pretrained, spec, compute, model_dtype(dtype, device), device, trust_remote_code)
            tokenizer = tokenizer or load_tokenizer(pretrained, trust_remote_code)
        else:
            model = pretrained
        automatic = batch_size is None or str(batch_size).startswith("auto")
        self.max_members = None if automatic else int(batch_size or 1)
        with _undeclared(model):
            super().__init__(
                pretrained=model, tokenizer=tokenizer, batch_size=self.max_members or _GENERATION_BATCH, **hflm_options
            )
        self.tokens_per_pass = tokens_per_pass or TOKENS_PER_PASS.get(self.device.type, TOKENS_PER_PASS["cpu"])
        self.shares_prefixes = _takes_trees(model)
        self.requests_done = 0
        self.tokens_done = 0
        self.seconds = 0.0
        self._probed_length = 0

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """(sum of log-probabilities, whether greedy decoding gives it) of each (key, context, continuation)."""
        fitting = [request for request in enumerate(requests) if self._fits(*request[1][1:])]
        trees = self._trees([request for _, request in fitting])
        start = time.perf_counter()
        answers: dict[int, Answer] = {}
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm or not trees) as bar:
            for tree in trees:
                found = self._score_tree(tree, [fitting[member][1] for member in tree.members])
                answers.update(zip((fitting[member][0] for member in tree.members), found, strict=True))
                self.tokens_done += len(tree.tokens)
                bar.update(len(found))
        for index, answer in answers.items():
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        rest = [index for index in range(len(requests)) if index not in answers]
        if rest:
            plain = super()._loglikelihood_tokens([requests[index] for index in rest], disable_tqdm, override_bs)
            answers.update(zip(rest, plain, strict=True))
            self.tokens_done += sum(len(requests[index][1]) + len(requests[index][2]) - 1 for index in rest)
        self.requests_done += len(requests)
        self.seconds += time.perf_counter() - start
        return [answers[index] for index in range(len(requests))]

    def _fits(self, context: list[int], continuation: list[int]) -> bool:
        """Whether nothing has to be cut off, which HFLM does at a place that depends on the continuation."""
        return bool(context and continuation) and len(context) + len(continuation) <= self.max_length + 1

    def _trees(self, requests: list[Request]) -> list[PrefixTree]:
        """The trees that this model may be given for these requests; what is in none runs as HFLM runs it."""
        if not self.shares_prefixes:
            return []
        sequences = [(context + continuation)[:-1] for _, context, continuation in requests]
        trees = list(pack(sequences, self.tokens_per_pass, self.max_members))
        branching = [tree for tree in trees if not tree.is_chain]
        tree = max(branching, key=lambda tree: max(map(len, tree.paths)), default=None)
        # Longer inputs than those compared before may meet a sliding window, which a tree's mask would not have.
        if tree is not None and max(map(len, tree.paths)) > self._probed_length:
            self._probed_length = max(map(len, tree.paths))
            self.shares_prefixes = self._probe(tree, requests)
        return trees if self.shares_prefixes else [tree for tree in trees if tree.is_chain]

    def _score_tree(self, tree: PrefixTree, requests: Sequence[Request]) -> list[Answer]:
        """Answers of the tree's members, in their order."""
        nodes = [path[-len(cont) :] for path, (_, _, cont) in zip(tree.paths, requests, strict=True)]
        flat = torch.as_tensor([node for each in nodes for node in each], device=self.device)
        targets = torch.as_tensor([token for _, _, cont in requests for token in cont], device=self.device)
        kept, rows = torch.unique(flat, return_inverse=True)
        logits = self._tree_logits(tree, kept)
        log_probs, greedy = [], []
        for part, wanted in zip(torch.split(rows, _LOGIT_ROWS), torch.split(targets, _LOGIT_ROWS), strict=True):
            picked = logits[part].float()
            log_probs.append(picked.gather(1, wanted[:, None])[:, 0] - picked.logsumexp(dim=1))
            greedy.append(picked.argmax(dim=1) == wanted)
        lengths = [len(cont) for _, _, cont in requests]
        sums = [float(values.sum()) for values in torch.split(torch.cat(log_probs).cpu(), lengths)]
        exact = [bool(values.all()) for values in torch.split(torch.cat(greedy).cpu(), lengths)]
        return list(zip(sums, exact, strict=True))

    def _tree_logits(self, tree: PrefixTree, kept: torch.Tensor) -> torch.Tensor:
        """[kept, vocabulary] logits at the kept nodes."""
        mask = None
        if not tree.is_chain:
            allowed = torch.from_numpy(tree.mask()).to(self.device)
            dtype = self.model.dtype
            mask = torch.zeros(allowed.shape, dtype=dtype, device=self.device)
            mask = mask.masked_fill_(~allowed, torch.finfo(dtype).min)[None, None]
        with torch.inference_mode():
            output = self.model(
                input_ids=torch.tensor([tree.tokens], device=self.device),
                position_ids=torch.tensor([tree.positions], device=self.device),
                attention_mask=mask,
                logits_to_keep=kept,
                use_cache=False,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _probe(self, tree: PrefixTree, requests: list[Request]) -> bool:
        """Whether the tree's longest member and its neighbours score in a tree what they score alone."""
        longest = max(range(len(tree.paths)), key=lambda index: len(tree.paths[index]))
        first = max(0, min(longest, len(tree.members) - _PROBED_REQUESTS))
        sample: list[Request] = [(None, *requests[i][1:]) for i in tree.members[first : first + _PROBED_REQUESTS]]
        (small,) = pack([(context + continuation)[:-1] for _, context, continuation in sample], sys.maxsize)
        try:
            # Rounding activations to 8 bits magnifies differences of the last digit, which would drown others.
            with _float_activations(self.model):
                expected = super()._loglikelihood_tokens(sample, disable_tqdm=True)
                found = self._score_tree(small, [sample[member] for member in small.members])
        except (RuntimeError, TypeError, ValueError) as error:
            logger.warning("this model takes no prefix trees (%s); every request runs alone, which is slower.", error)
            return False
        pairs = zip(found, (expected[member] for member in small.members), strict=True)
        worst = max(abs(one[0] - other[0]) / (1 + abs(other[0])) for one, other in pairs)
        tolerance = _PROBE_TOLERANCE if self.model.dtype == torch.float32 else _PROBE_TOLERANCE_16
        if not worst <= tolerance:
            logger.warning("prefix trees change this model's scores (%.2g); every request runs alone, slower.", worst)
            return False
        return True


@contextlib.contextmanager
def _float_activations(model: PreTrainedModel) -> Iterator[None]:
    layers = [layer for layer in model.modules() if isinstance(layer, QLinear)]
    modes = [layer.compute for layer in layers]
    try:
        for layer in layers:
            layer.compute = "float"
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.compute = mode


@contextlib.contextmanager
def _undeclared(model: PreTrainedModel) -> Iterator[None]:
    """Hides the config's note that weights are packed, for which HFLM would import compressed-tensors."""
    declared = vars(model.config).pop("quantization_config", None)
    try:
        yield
    finally:
        if declared is not None:
            model.config.quantization_config = declared


def _takes_trees(model: PreTrainedModel) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return {"position_ids", "attention_mask", "logits_to_keep"} <= set(parameters)
