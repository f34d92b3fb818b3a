"""Bits for every module by each method, the perplexity under them, and the memory that they take."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtale import ops
from qtale.files import write_whole
from qtale.importance import Importance
from qtale.memory import needed
from qtale.planner import Options, Plan, Planner
from qtale.planner.items import layer_of
from qtale.planner.scores import BEST
from qtale.planner.source import Source
from qtale.spec import QuantSpec

WIDTHS = (8, 4, 3, 2)
Bits = Mapping[str, int]


@dataclass(frozen=True)
class Mix:
    """Bits of every module by one method; ``average`` was asked for, ``group_size`` is 64 or "channel"."""

    method: str
    average: float
    group_size: int | str
    bits: Bits
    seed: int | None = None

    @property
    def key(self) -> str:
        """What the perplexity depends on."""
        text = json.dumps([self.group_size, sorted(self.bits.items())])
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def spec_of(self, module: str) -> QuantSpec | None:
        """How a module is rounded, None where it stays as stored."""
        bits = self.bits.get(module, 16)
        return None if bits == 16 else QuantSpec(bits, self.group_size)


@dataclass(frozen=True)
class Methods:
    """Every way to spend an average number of bits on the model of ``source``."""

    source: Source
    work: Path

    @property
    def layers(self) -> int:
        return self.source.shape.num_layers

    def same(self, bits: int, group_size: int | str, method: str = "uniform") -> Mix:
        """The same bits everywhere."""
        return Mix(method, bits, group_size, {linear.name: bits for linear in self.source.shape.linears})

    def by_order(self, method: str, average: float, group_size: int | str, order: Sequence[int], **more: Any) -> Mix:
        """The first layers of ``order`` get the width above the average, the others that below: LSAQ's greedy."""
        low = max(width for width in WIDTHS if width <= average)
        high = min(width for width in WIDTHS if width >= average)
        wide = set(order[: self._wide(average)])
        bits = {one.name: high if layer_of(one.name) in wide else low for one in self.source.shape.linears}
        return Mix(method, average, group_size, bits, **more)

    def greedy(self, importance: Importance, metric: str, average: float, group_size: int | str) -> Mix:
        return self.by_order(f"greedy {metric}", average, group_size, importance.ranking(metric))

    def spread(self, average: float, group_size: int | str) -> Mix:
        """The wider layers evenly spread over the depth."""
        count = self._wide(average)
        wide = [int((place + 0.5) * self.layers / count) for place in range(count)]
        return self.by_order("uniform mix", average, group_size, wide)

    def random(self, average: float, group_size: int | str, seed: int) -> Mix:
        order = np.random.default_rng(seed).permutation(self.layers).tolist()
        return self.by_order("random", average, group_size, order, seed=seed)

    def knapsack(self, source: Source, metric: str, average: float, group_size: int | str) -> Mix:
        """The planner's choice by module, with the code bits that the mixes of whole layers take.

        What ``best`` chose is kept, since it runs the model.
        """
        if metric == BEST:
            return replace(self._best(source, average, group_size), method=f"knapsack {BEST}")
        plan = self._plan(source, metric, average, group_size)
        bits = {linear.name: plan.bits_of(linear.name) for linear in self.source.shape.linears}
        return Mix(f"knapsack {metric}", average, group_size, bits)

    def _best(self, source: Source, average: float, group_size: int | str) -> Mix:
        importance = source.importance
        settings = {"fingerprint": source.model.fingerprint}
        cache = Cache(self.work / "best.json", settings)
        scores = {} if importance is None else {name: list(values) for name, values in importance.scores.items()}
        key = hashlib.sha256(json.dumps([average, group_size, scores]).encode()).hexdigest()[:24]
        if key not in cache.losses:
            cache.put(key, self._plan(source, BEST, average, group_size).metric)
        return self.knapsack(source, cache.losses[key], average, group_size)

    def _plan(self, source: Source, metric: str, average: float, group_size: int | str) -> Plan:
        options = Options(mode="knapsack", metric=metric, choices=WIDTHS, group_size=group_size).resolved()
        planner = Planner(source, options, self.work / f"errors-{group_size}.json", progress=False)
        return planner.for_average(self.mean_bits(self.spread(average, group_size).bits))

    def mean_bits(self, bits: Bits) -> float:
        """Code bits per weight of the decoder blocks."""
        shape = self.source.shape
        return sum(linear.weights * bits[linear.name] for linear in shape.linears) / shape.weights

    def weight_bytes(self, mix: Mix) -> int:
        """What the planner says that weights, scales, embedding and norms take."""
        return needed(self.source.shape, mix.spec_of, context=0, batch=1).weights

    def _wide(self, average: float) -> int:
        low = max(width for width in WIDTHS if width <= average)
        high = min(width for width in WIDTHS if width >= average)
        return self.layers if high == low else round((average - low) / (high - low) * self.layers)


class Model:
    """The model in transformers, its matrices swapped for ones that qtale's operators rounded once per width."""

    def __init__(self, source: Source, tokens: torch.Tensor, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        if source.folder is None:
            raise ValueError("perplexity needs the weights")
        self.tokens, self.dtype = tokens, dtype
        self.stored = {one.name: source.folder.torch(f"{one.name}.weight") for one in source.shape.linears}
        self.rounded: dict[tuple[str, int, int | str], torch.Tensor] = {}
        self.model = AutoModelForCausalLM.from_pretrained(source.folder.path, dtype=dtype).eval()

    def use(self, mix: Mix) -> None:
        """Give the model the matrices of this mix."""
        for name in self.stored:
            self.model.get_submodule(name).weight.data = self._weight(name, mix.bits[name], mix.group_size)

    @torch.inference_mode()
    def loss(self, mix: Mix) -> float:
        """Mean negative log-likelihood in nats of the tokens [windows, length], each window from its second on."""
        self.use(mix)
        losses = []
        for window in self.tokens:
            logits = self.model(window[None]).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
        return math.fsum(losses) / len(losses)

    def packed_bytes(self, mix: Mix) -> int:
        """Bytes of the buffers that the kernels compute from, allocated and counted one after another."""
        return sum(self._packed(name, bits, mix.group_size).nbytes for name, bits in mix.bits.items())

    def _packed(self, name: str, bits: int, group_size: int | str) -> torch.Tensor:
        if bits == 16:
            return self.stored[name]
        codes, scale, _ = self._codes(name, bits, group_size)
        return ops.prepack(codes, scale, None, num_bits=bits)

    def _codes(self, name: str, bits: int, group_size: int | str) -> Any:
        weight = self.stored[name]
        return ops.quantize(weight, bits, QuantSpec(bits, group_size).resolve(name, weight.shape[1]).group_size)

    def _weight(self, name: str, bits: int, group_size: int | str) -> torch.Tensor:
        key = name, bits, group_size
        if key not in self.rounded:
            if bits == 16:
                self.rounded[key] = self.stored[name].to(self.dtype)
            else:
                codes, scale, _ = self._codes(name, bits, group_size)
                self.rounded[key] = ops.dequantize(codes, scale.float(), None, "float32").to(self.dtype)
        return self.rounded[key]


class Cache:
    """Figures that were computed before, in a file; those of other settings are left out."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.losses: dict[str, Any] = found["losses"] if found.get("settings") == self.settings else {}

    def put(self, key: str, loss: Any) -> None:
        self.losses[key] = loss
        write_whole(self.path, json.dumps({"settings": self.settings, "losses": self.losses}, indent=1) + "\n")
