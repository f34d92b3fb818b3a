"""What routed execution needs beside a model: routers by layer, the threshold, and what skipped tokens leave behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qtale.errors import InputError

EVICT, KEEP = "evict", "keep"
KV_RULES = (EVICT, KEEP)
MAX_FORCED_TOKENS = 2**31 - 1
Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RouterWeights:
    """The router of one layer, all float32; its input x [hidden] is the raw residual stream that enters the layer.

    With ``w2``: logits [2] (skip, execute) = w2 · silu(rms_norm(w1 · x + bias1) * norm) + bias2, and the probability to
    execute is softmax(logits)[1] (D-LLM, NeurIPS 2024, as its code has it). ``w1`` [h, hidden], ``bias1`` and ``norm``
    [h], ``w2`` [2, h], ``bias2`` [2]; biases and norm may be None. Without ``w2``, ``w1`` is [1, hidden], and the
    probability is sigmoid(w1 · x + bias1).
    """

    w1: Array
    bias1: Array | None = None
    norm: Array | None = None
    w2: Array | None = None
    bias2: Array | None = None
    norm_eps: float = 1e-6

    def tensors(self) -> dict[str, Array]:
        """The weights that are there, by name."""
        named = {"w1": self.w1, "bias1": self.bias1, "norm": self.norm, "w2": self.w2, "bias2": self.bias2}
        return {name: value for name, value in named.items() if value is not None}

    def check(self, hidden_size: int, where: str) -> None:
        """Raises InputError where shapes do not fit each other or a value is not finite."""
        width = self.w1.shape[0] if self.w1.ndim == 2 else 0
        expected: dict[str, tuple[int, ...]] = {"w1": (width, hidden_size), "bias1": (width,)}
        if self.w2 is not None:
            expected |= {"norm": (width,), "w2": (2, width), "bias2": (2,)}
        elif width != 1:
            raise InputError(f"{where}: w1 has shape {list(self.w1.shape)}; without w2 it must be [1, {hidden_size}].")
        for name, value in self.tensors().items():
            if name not in expected:
                raise InputError(f"{where}: has {name} but no w2; a single Linear takes w1 and bias1 only.")
            if width == 0 or value.shape != expected[name]:
                raise InputError(f"{where}: {name} has shape {list(value.shape)}; expected {list(expected[name])}.")
            if not np.isfinite(value).all():
                raise InputError(f"{where}: {name} holds NaN or infinity; train the router again.")
        if not 0 <= self.norm_eps < 1:
            raise InputError(f"{where}: norm_eps is {self.norm_eps}; use 0 up to 1.")


@dataclass(frozen=True)
class Routing:
    """Routers by layer, layers without one always run.

    A token runs a routed layer when its probability is at least ``theta``; the first ``forced_tokens`` of a sequence
    always do. A skipped token leaves no keys and values in that layer under ``kv_rule`` "evict"; with "keep" it does.
    """

    routers: Mapping[int, RouterWeights] = field(default_factory=dict)
    theta: float = 0.5
    forced_tokens: int = 2
    kv_rule: str = EVICT

    def check(self, num_layers: int, hidden_size: int, where: str) -> None:
        """Raises InputError where this does not fit a model of these sizes."""
        if not (isinstance(self.theta, (int, float)) and 0 <= self.theta <= 1):
            raise InputError(f"{where}: theta is {self.theta!r}; it is a probability, so use 0 to 1.")
        if type(self.forced_tokens) is not int or not 0 <= self.forced_tokens <= MAX_FORCED_TOKENS:
            raise InputError(f"{where}: forced_tokens is {self.forced_tokens!r}; use 0 to {MAX_FORCED_TOKENS}.")
        if self.kv_rule not in KV_RULES:
            raise InputError(f"{where}: kv_rule is {self.kv_rule!r}; use {' or '.join(KV_RULES)}.")
        for layer, router in self.routers.items():
            if not 0 <= layer < num_layers:
                raise InputError(f"{where}: routes layer {layer}, but the model has layers 0 to {num_layers - 1}.")
            router.check(hidden_size, f"{where}: layer {layer}")
