"""A decoder block that tokens can skip, in its dense form: every token is computed, skipped ones keep what they had.

This saves no time; it is what trains, what serves any architecture, and what the engine's compacted form is compared
with. Source: D-LLM (NeurIPS 2024): x' = x where a token skips, block(x) where it executes, and a skipped token is
masked out of the attention of that layer (KV eviction).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qtale.errors import InputError, UnsupportedError


class Router(nn.Module):
    """The probability that a token executes a layer, from the residual stream x [..., hidden] that enters it.

    ``width`` None is one Linear, sigmoid(w1 x + b1); else softmax(w2 silu(rms_norm(w1 x + b1)) + b2)[1] with ``width``
    hidden units (D-LLM). Computed in float32; the last bias starts at (0.1, 2.0), as D-LLM's does.
    """

    def __init__(self, hidden_size: int, width: int | None = 512, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.first = nn.Linear(hidden_size, width or 1)
        self.norm: nn.Module | None = nn.RMSNorm(width, eps=norm_eps) if width else None
        self.last = nn.Linear(width, 2) if width else None
        with torch.no_grad():
            if self.last is not None:
                self.last.bias.copy_(torch.tensor([0.1, 2.0]))
            else:
                self.first.bias.fill_(1.9)

    def logit(self, x: torch.Tensor) -> torch.Tensor:
        """[...]: the logit of executing, ln(p / (1 - p))."""
        hidden: torch.Tensor = self.first(x.float())
        if self.last is None or self.norm is None:
            return hidden[..., 0]
        logits = self.last(functional.silu(self.norm(hidden)))
        difference: torch.Tensor = logits[..., 1] - logits[..., 0]
        return difference

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[...]: probabilities to execute, float32."""
        return self.logit(x).sigmoid()


class RoutedLayer(nn.Module):
    """Wraps a decoder layer of transformers, which it calls with the same arguments.

    A token executes when the router's probability is at least ``theta`` or its position is below ``forced_tokens``.
    ``router`` None makes a constant decision, ``runs``. With ``keep_skipped`` skipped tokens stay visible to later
    ones. After a call, ``executed`` bool [batch, tokens] holds the decisions.
    """

    def __init__(
        self,
        layer: nn.Module,
        router: Router | None,
        *,
        theta: float = 0.5,
        forced_tokens: int = 2,
        keep_skipped: bool = False,
        runs: bool = True,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.router = router
        self.theta, self.forced_tokens = theta, forced_tokens
        self.keep_skipped, self.runs = keep_skipped, runs
        self.executed = torch.zeros(0, 0, dtype=torch.bool)
        self._seen = torch.zeros(0, 0, dtype=torch.bool)

    def __getattr__(self, name: str) -> Any:
        # Models ask their layers for what they are ("attention_type" …).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def decide(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Bool [batch, tokens]: who executes, for x [batch, tokens, hidden] at position_ids [batch or 1, tokens]."""
        if self.router is None:
            return torch.full(x.shape[:2], self.runs, dtype=torch.bool, device=x.device)
        chosen: torch.Tensor = (self.router(x) >= self.theta) | (position_ids < self.forced_tokens)
        return chosen

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[batch, tokens, hidden], as the wrapped layer gives it. Raises UnsupportedError for unknown masks."""
        if position_ids is None:
            raise InputError("RoutedLayer: needs position_ids [batch, tokens]; the models of transformers give them.")
        past = 0 if past_key_values is None else past_key_values.get_seq_length(self._index())
        self.executed = self.decide(hidden_states, position_ids)
        seen = self._seen if past else self.executed[:, :0]
        if seen.shape[1] != past or seen.shape[0] != self.executed.shape[0]:
            raise InputError(
                f"RoutedLayer: the cache holds {past} tokens, but decisions are known for {seen.shape[1]}; start with "
                "an empty cache."
            )
        self._seen = torch.cat([seen, self.executed], dim=1)
        mask = attention_mask if self.keep_skipped else self._mask(attention_mask, hidden_states)
        out = self.layer(
            hidden_states,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return torch.where(self.executed[..., None], out, hidden_states)

    def _index(self) -> int:
        return int(self.layer.self_attn.layer_idx)  # type: ignore[union-attr, arg-type]

    def _mask(self, given: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """The mask [batch, 1, tokens, entries] without skipped entries; each token still sees itself."""
        tokens, entries = x.shape[1], self._seen.shape[1]
        places = torch.arange(entries - tokens, entries, device=x.device)[:, None]
        own = torch.arange(entries, device=x.device)[None, :]
        visible = self._seen[:, None, None, :] | (own == places)
        if given is None:
            visible = visible & (own <= places)
        elif given.dim() != 4 or given.shape[-1] < entries:
            raise UnsupportedError(
                f"RoutedLayer: takes attention masks [batch, 1, tokens, entries], not {list(given.shape)}; load the "
                "model with attn_implementation='sdpa' or 'eager'."
            )
        elif given.dtype == torch.bool:
            return given[..., :entries] & visible
        else:
            return given[..., :entries].masked_fill(~visible, torch.finfo(given.dtype).min)
        return visible
